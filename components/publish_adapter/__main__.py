"""`python -m layerloop.components.publish_adapter`."""

from layerloop.components.publish_adapter.step import main
from layerloop.components.runtime.contract import end_process

end_process(main())
