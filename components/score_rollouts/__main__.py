"""`python -m layerloop.components.score_rollouts`."""

from layerloop.components.score_rollouts.step import main

raise SystemExit(main())
