"""`python -m layerloop.components.shard_dataset`."""

from layerloop.components.runtime.contract import end_process
from layerloop.components.shard_dataset.step import main

end_process(main())
