"""`python -m layerloop.components.train_stretch`."""

from layerloop.components.runtime.contract import end_process
from layerloop.components.train_stretch.step import main

end_process(main())
