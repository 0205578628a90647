# SPDX-License-Identifier: Apache-2.0
"""From image files to a mask without PyTorch and MONAI: what the bundle's transforms and inferer share with `segment`.

Everything here works on numpy arrays and SimpleITK images. The import contracts forbid torch and monai.
"""
