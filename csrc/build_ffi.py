"""The cffi module: its declarations are cut out of the header that C users include."""

import pathlib

from cffi import FFI

_header = (pathlib.Path(__file__).resolve().parent / "hotloops.h").read_text()
ffibuilder = FFI()
ffibuilder.cdef(_header.split("/* cffi:begin */")[1].split("/* cffi:end */")[0])
ffibuilder.set_source(
    "hotloops._ckernels",
    """
#include "hotloops.h"
#include "parallel.h"
#include <Python.h>
/* Runs Python's signal handlers between chunks of a long call; only the main thread has any to run. */
static int poll_signals(void)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    int raised = PyErr_CheckSignals();
    if (raised) PyErr_Clear();   /* the adapter raises KeyboardInterrupt from the status */
    PyGILState_Release(gil);
    return raised ? HL_INTERRUPTED : HL_OK;
}
__attribute__((constructor)) static void set_poll(void) { hl_poll = poll_signals; }
""",
)
