"""`python -m layerloop.components.generate_rollouts`."""

from layerloop.components.generate_rollouts.step import main

raise SystemExit(main())
