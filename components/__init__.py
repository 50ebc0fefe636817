"""The mathematics, as pure functions on tensors, and the types and protocols that everything shares.

Conventions, stated once and used everywhere:

- Pixel x points right, y down; the centre of pixel (column, row) lies at (column + 0.5, row + 0.5).
- `c2w` is [3, 4] (camera to world) with OpenCV's camera axes (x right, y down, z forward) for every data set;
  loaders convert OpenGL's (x right, y up, z backward) by diag(1, -1, -1). World units are the data set's.
- Forward-facing (LLFF) worlds look along -z, as the NDC warp expects.
- rgb is in [0, 1]; stored pixels are 8 bit.
"""
