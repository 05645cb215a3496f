"""Build of this distribution, refused where Hugging Face's ``kernels`` would be overwritten."""

import sysconfig
from importlib import metadata

from setuptools import setup

if __name__ == "__main__":
    for other in metadata.distributions(name="kernels", path=[sysconfig.get_path("purelib")]):
        raise SystemExit(
            f"The distribution 'kernels' {other.version} is installed in this environment. The "
            "engine has a package of the same name, so it needs an environment of its own."
        )
    # The packages are found in the parent folder, so a build folder here would be one of them.
    setup(script_name="setup.py", options={"build": {"build_base": "../build/engine"}})
