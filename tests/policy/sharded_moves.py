"""One of two ranks that share a base: moves its policy from iteration to iteration, keeps what it computes there, and
at last runs steps with it.

The base is loaded twice, without an adapter and then with one.

    torchrun --nproc-per-node=2 sharded_moves.py CAMPAIGN FOLDER '[[iteration, trainable, delivered], ...]'
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerloop.components.evaluate_adapter import step as evaluate_adapter
from layerloop.components.generate_rollouts import step as generate_rollouts
from layerloop.components.policy.at import policy_at
from layerloop.components.policy.model import Condition
from layerloop.components.publish_adapter import step as publish_adapter
from layerloop.components.runtime.distributed import process_group, rank
from layerloop.components.storage.campaign import Campaign

uri, folder, moves = sys.argv[1:]
outputs, loaded = {}, None
with process_group() as device:
    for index, (iteration, trainable, delivered) in enumerate(json.loads(moves)):
        loaded = policy_at(
            Campaign.open(uri), iteration, device=device, sharded=True, trainable=trainable, delivered=delivered,
            loaded=None if index == 1 else loaded,
        )  # fmt: skip
        assert loaded.policy.sharded
        seen = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
        condition = Condition(seen, loaded.prompt[None], 32, 48)
        with torch.no_grad():
            outputs[f"{index}"] = loaded.policy.velocity(loaded.policy.noise(3, 2, 32, 48), 0.8, condition)
        outputs[f"{index}.trainable"] = torch.tensor(len(loaded.policy.trainable_parameters()))
    evaluate_adapter.run(loaded, campaign=uri, iteration=1)
    publish_adapter.run(loaded, campaign=uri, iteration=2, publish_as="second")
    generate_rollouts.run(loaded, campaign=uri, iteration=4)
    assert torch.distributed.is_initialized(), "a step leaves the group that it found"
save_file(outputs, Path(folder) / f"rank{rank()}.safetensors")
