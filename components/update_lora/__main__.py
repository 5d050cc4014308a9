"""`python -m layerloop.components.update_lora`."""

from layerloop.components.runtime.contract import end_process
from layerloop.components.update_lora.step import main

end_process(main())
