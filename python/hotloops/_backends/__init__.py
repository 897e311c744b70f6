"""One adapter a backend. An adapter module has:

`NAME`, `SPACE` ("host" or "cuda"), `status() -> str` ("" when it can run here, else the reason), `broken() -> str` (the
error of a present but broken backend, else ""), `describe() -> str` (what it runs on), and
`prepare(record, dtype) -> call(arrays, sizes, scalars) | None` (None: it does not have this kernel for this type).
"""
