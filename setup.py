"""Build: everything is in pyproject.toml, except that foldcp.pth must land in site-packages."""

from __future__ import annotations

from setuptools import Distribution, setup

from distutils.command.install_data import install_data  # isort: skip  # provided by setuptools


class InstallBesidePackages(install_data):
    """Installs data files into site-packages instead of the environment's root.

    Python reads .pth files only there. Regular and editable builds both run this command, so the
    file is listed in RECORD either way and `pip uninstall` removes it.
    """

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("root", "root"))
        super().finalize_options()


class DistributionWithData(Distribution):
    """Tells editable builds that there are data files: they ask for `has_data`."""

    def has_data(self) -> bool:
        return True


setup(
    distclass=DistributionWithData,
    data_files=[("", ["foldcp.pth"])],
    cmdclass={"install_data": InstallBesidePackages},
)
