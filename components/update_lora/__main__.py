"""`python -m layerloop.components.update_lora`."""

from layerloop.components.update_lora.step import main

raise SystemExit(main())
