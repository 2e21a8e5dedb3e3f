"""The losses and the intervention in other people's code: one module for each package, imported by its name.

`cdas_fast.dropin.liger`, `.transformers`, `.trl` and `.pyvene` take the place of what those packages have. Nothing of
them is imported here; docs/drop-in.md shows each swap as a diff.
"""
