"""The Triton kernels of fastlora, one file per primitive.

Importing this package loads no Triton: :mod:`fastlora.kernels.configs` is plain Python, and only
:mod:`fastlora.ops` imports the kernels themselves, when the first one is launched.
"""
