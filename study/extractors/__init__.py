"""Feature extractors: in-domain ones with the script that trained them, and InceptionV3."""
