"""Modules that take seconds to import, for test files: each worker of pytest reads all the files,
but runs the tests of a few."""

import importlib


class Lazily:
    """The module of this name, which is imported when a test first asks it for something."""

    def __init__(self, name):
        self.__name__ = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):  # pytest asks all that it finds in a file for such ones
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.__name__), attribute)
