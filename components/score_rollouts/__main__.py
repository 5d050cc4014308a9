"""`python -m layerloop.components.score_rollouts`."""

from layerloop.components.runtime.contract import end_process
from layerloop.components.score_rollouts.step import main

end_process(main())
