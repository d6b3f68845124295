"""Spatial Forcing: align a vision-language-action model with a frozen 3D foundation model (arXiv 2510.12276)."""
