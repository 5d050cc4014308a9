"""`python -m layerloop.components.evaluate_adapter`."""

from layerloop.components.evaluate_adapter.step import main
from layerloop.components.runtime.contract import end_process

end_process(main())
