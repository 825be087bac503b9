"""The part of panopticapi that mmdet calls. The package itself is on no index, so the tests cannot install it."""
