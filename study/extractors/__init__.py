"""In-domain feature extractors, shipped with the script that trained them."""
