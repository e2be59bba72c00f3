# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can put right."""


class UsageError(Exception):
    """A setting, a file or a folder that can't be used. The message is one line that names it and the way out;
    the command line prints it and exits with 2."""
