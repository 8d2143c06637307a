"""The legacy build."""

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="rolling",
    version="1.0",
    packages=["rolling"],
    ext_modules=[CppExtension("rolling._C", ["csrc/rolling.cpp"])],
    cmdclass={"build_ext": BuildExtension},
)
