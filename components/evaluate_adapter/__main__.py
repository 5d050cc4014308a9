"""`python -m layerloop.components.evaluate_adapter`."""

from layerloop.components.evaluate_adapter.step import main

raise SystemExit(main())
