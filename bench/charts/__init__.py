# SPDX-License-Identifier: Apache-2.0
"""Charts and tables, made of the rows in bench/results; a module for each kind of rows."""
