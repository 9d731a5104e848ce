"""Training of latent diffusion models of the SDXL family."""

import os

PARENT = os.getppid()  # before torch is imported, which takes seconds: a launcher that ends meanwhile must be noticed
