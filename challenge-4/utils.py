"""The front door of the folder: lazy collections over anything, files and databases included.

A chain is a plan: building it runs nothing, running it is one loop. `lazy.py` is the class,
`compiler.py` the executor, `expressions.py` what both the loop and SQL are written from.
"""

from caching import CacheFullError
from compiler import TooManyKeysError
from cursors import CursorError
from databases import DatabaseError
from expressions import Expr, col, it, lit
from files import BadLineError
from lazy import EmptyCollectionError, LazyCollection, LazyIterator
from pages import Page
from sources import LazyError, SourceExhaustedError
from tables import DatabaseLazyCollection, UnorderedRowsError

__all__ = [
    "BadLineError",
    "CacheFullError",
    "CursorError",
    "DatabaseError",
    "DatabaseLazyCollection",
    "EmptyCollectionError",
    "Expr",
    "LazyCollection",
    "LazyError",
    "LazyIterator",
    "Page",
    "SourceExhaustedError",
    "TooManyKeysError",
    "UnorderedRowsError",
    "col",
    "from_csv",
    "from_ndjson",
    "from_query",
    "from_table",
    "it",
    "lit",
]

from_csv, from_ndjson = LazyCollection.from_csv, LazyCollection.from_ndjson
from_query, from_table = DatabaseLazyCollection.from_query, DatabaseLazyCollection.from_table
