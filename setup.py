"""The metadata is in pyproject.toml. Native extensions (csrc/) will be declared here."""

from setuptools import setup

setup()
