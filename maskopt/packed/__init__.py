"""Packed folders: pruned models whose zeros take one bit each, and which transformers loads.

A packed folder holds

- ``config.json``: the type ``maskopt-packed``, which no version of transformers takes for another one, and as
  ``dense_config`` the model's own configuration;
- ``packed.json``: the version of the format, and for every tensor of the checkpoint its type, shape, file, number of
  nonzero values, the CRC-32 of its dense bytes, and the parts that hold it (`maskopt.packed.packed_tensors`);
- ``packed-*.safetensors``: those parts, one file for each file of weights that the dense folder has;
- ``maskopt_reader.py`` and ``packed_tensors.py``: copies of the modules here, with which transformers loads the folder
  where maskopt is not installed;
- every other file of the dense folder as it is.

Nothing is imported here, because `import maskopt` passes through this package (`maskopt.packed.registration`).
"""
