"""`python -m layerloop.components.generate_rollouts`."""

from layerloop.components.generate_rollouts.step import main
from layerloop.components.runtime.contract import end_process

end_process(main())
