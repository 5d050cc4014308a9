"""`python -m layerloop.components.publish_adapter`."""

from layerloop.components.publish_adapter.step import main

raise SystemExit(main())
