"""`python -m layerloop.components.shard_dataset`."""

from layerloop.components.shard_dataset.step import main

raise SystemExit(main())
