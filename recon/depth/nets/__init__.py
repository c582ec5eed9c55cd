"""Network definitions. They import torch at the top and are themselves imported only where a module is built."""
