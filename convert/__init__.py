"""From an official GLM-Image checkpoint to a quantised one.

Packaged as `qruntime.convert`; in a checkout it is the folder `convert`, run as `python -m convert`. It builds on
`qruntime`, which does not need it to draw.
"""
