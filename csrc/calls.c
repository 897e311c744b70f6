/* hotloops._calls: a call of a C kernel that repeats, prepared (see _plan.py). Called with an op's arguments it makes the
 * results, or takes the one that is given (`out`), takes the addresses of the arrays, runs the kernel without the
 * interpreter's lock, and returns the results. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>

enum { MAX_RESULTS = 4, MAX_POINTERS = 15, ABSENT = -1 };

typedef struct {
    PyObject ob_base;
    vectorcallfunc vectorcall;
    void *kernel;
    const void *plan;
    PyObject *kept; /* what kernel and plan are the addresses of */
    PyObject *fail; /* called with a status that is not 0, it raises */
    PyObject *made; /* of each result (function, shape, element type), or which argument it is */
    PyObject *sources; /* of each pointer: argument i, result -2 - i, or ABSENT */
    Py_ssize_t arguments; /* that the op takes here */
    int returns_tuple;
    int source[MAX_POINTERS];
    int given[MAX_RESULTS]; /* the argument that a result is, or ABSENT */
} Call;

/* Every kernel takes the address of its plan, then as many more. */
#define T1 void *
#define T2 T1, void *
#define T3 T2, void *
#define T4 T3, void *
#define T5 T4, void *
#define T6 T5, void *
#define T7 T6, void *
#define T8 T7, void *
#define T9 T8, void *
#define T10 T9, void *
#define T11 T10, void *
#define T12 T11, void *
#define T13 T12, void *
#define T14 T13, void *
#define T15 T14, void *
#define P1 p[0]
#define P2 P1, p[1]
#define P3 P2, p[2]
#define P4 P3, p[3]
#define P5 P4, p[4]
#define P6 P5, p[5]
#define P7 P6, p[6]
#define P8 P7, p[7]
#define P9 P8, p[8]
#define P10 P9, p[9]
#define P11 P10, p[10]
#define P12 P11, p[11]
#define P13 P12, p[12]
#define P14 P13, p[13]
#define P15 P14, p[14]
#define CASE(n) \
    case n: return ((int (*)(const void *, T##n))kernel)(plan, P##n)
static int run(void *kernel, const void *plan, void **p, Py_ssize_t count)
{
    switch (count) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
        CASE(13);
        CASE(14);
        CASE(15);
    }
    return -1;
}

/* A new reference to what the op returns, or NULL with an exception set. */
static PyObject *finish(const Call *c, PyObject **results, Py_ssize_t count)
{
    if (!c->returns_tuple) return Py_NewRef(results[0]);
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple && i < count; i++) PyTuple_SET_ITEM(tuple, i, Py_NewRef(results[i]));
    return tuple;
}

/* Whether a result that was given shares memory with an array that is read. */
static int overlaps(const Call *c, const Py_buffer *views, Py_ssize_t pointers)
{
    for (Py_ssize_t i = 0, out = 0; i < pointers; i++) {
        if (c->source[i] == ABSENT) continue;
        const Py_buffer *written = &views[out++];
        if (c->source[i] >= 0 || c->given[-2 - c->source[i]] == ABSENT) continue;
        const char *begin = written->buf, *end = begin + written->len;
        for (Py_ssize_t k = 0, in = 0; k < pointers; k++) {
            if (c->source[k] == ABSENT) continue;
            const Py_buffer *read = &views[in++];
            if (c->source[k] >= 0 && (const char *)read->buf < end && begin < (const char *)read->buf + read->len)
                return 1;
        }
    }
    return 0;
}

static PyObject *call(PyObject *self, PyObject *const *arguments, size_t flags, PyObject *names)
{
    const Call *c = (const Call *)self;
    if (names || PyVectorcall_NARGS(flags) != c->arguments) {
        PyErr_SetString(PyExc_TypeError, "a prepared call takes its arguments by position, all of them");
        return NULL;
    }
    Py_ssize_t made = 0, held = 0, count = PyTuple_GET_SIZE(c->made), pointers = PyTuple_GET_SIZE(c->sources);
    PyObject *results[MAX_RESULTS], *answer = NULL;
    Py_buffer views[MAX_POINTERS];
    void *p[MAX_POINTERS];
    for (; made < count; made++) {
        PyObject *how = PyTuple_GET_ITEM(c->made, made);
        if (c->given[made] != ABSENT) results[made] = Py_NewRef(arguments[c->given[made]]);
        else results[made] = PyObject_Vectorcall(PyTuple_GET_ITEM(how, 0), &PyTuple_GET_ITEM(how, 1), 2, NULL);
        if (!results[made]) goto out;
    }
    for (Py_ssize_t i = 0; i < pointers; i++) {
        p[i] = NULL;
        if (c->source[i] == ABSENT) continue;
        PyObject *array = c->source[i] >= 0 ? arguments[c->source[i]] : results[-2 - c->source[i]];
        /* ValueError: not contiguous, or not to be written */
        if (PyObject_GetBuffer(array, &views[held], c->source[i] >= 0 ? PyBUF_SIMPLE : PyBUF_WRITABLE)) goto out;
        p[i] = views[held++].buf;
    }
    if (overlaps(c, views, pointers)) {
        PyErr_SetString(PyExc_ValueError, "the array that is written overlaps one that is read");
        goto out;
    }
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = run(c->kernel, c->plan, p, pointers);
    Py_END_ALLOW_THREADS;
    if (!status) answer = finish(c, results, count);
    else {
        PyObject *none = PyObject_CallFunction(c->fail, "i", status);
        if (none) PyErr_SetString(PyExc_SystemError, "a status was ignored");
        Py_XDECREF(none);
    }
out:
    while (held > 0) PyBuffer_Release(&views[--held]);
    while (made > 0) Py_DECREF(results[--made]);
    return answer;
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"kernel", "plan", "kept", "fail", "made", "sources", "arguments", "returns_tuple", NULL};
    Call *c = (Call *)type->tp_alloc(type, 0);
    if (!c) return NULL;
    unsigned long long kernel, plan;
    c->vectorcall = call;
    if (!PyArg_ParseTupleAndKeywords(args, names, "KKOOO!O!np", keywords, &kernel, &plan, &c->kept, &c->fail,
                                     &PyTuple_Type, &c->made, &PyTuple_Type, &c->sources, &c->arguments,
                                     &c->returns_tuple)) {
        c->kept = c->fail = c->made = c->sources = NULL;
        Py_DECREF(c);
        return NULL;
    }
    c->kernel = (void *)(uintptr_t)kernel, c->plan = (const void *)(uintptr_t)plan;
    Py_INCREF(c->kept), Py_INCREF(c->fail), Py_INCREF(c->made), Py_INCREF(c->sources);
    Py_ssize_t results = PyTuple_GET_SIZE(c->made), pointers = PyTuple_GET_SIZE(c->sources);
    int fits = results > 0 && results <= MAX_RESULTS && pointers > 0 && pointers <= MAX_POINTERS;
    for (Py_ssize_t i = 0; fits && i < results; i++) {
        PyObject *how = PyTuple_GET_ITEM(c->made, i);
        long argument = PyLong_CheckExact(how) ? PyLong_AsLong(how) : ABSENT;
        c->given[i] = (int)argument;
        fits = PyLong_CheckExact(how) ? argument >= 0 && argument < c->arguments
                                      : PyTuple_CheckExact(how) && PyTuple_GET_SIZE(how) == 3;
    }
    for (Py_ssize_t i = 0; fits && i < pointers; i++) {
        long source = PyLong_AsLong(PyTuple_GET_ITEM(c->sources, i));
        fits = source < c->arguments && source >= -1 - results;
        c->source[i] = (int)source;
    }
    if (fits && !PyErr_Occurred()) return (PyObject *)c;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a call that cannot be prepared");
    Py_DECREF(c);
    return NULL;
}

static void dealloc(PyObject *self)
{
    Call *c = (Call *)self;
    Py_XDECREF(c->kept), Py_XDECREF(c->fail), Py_XDECREF(c->made), Py_XDECREF(c->sources);
    Py_TYPE(self)->tp_free(self);
}

static PyTypeObject call_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "hotloops._calls.Call",
    .tp_doc = "A call of a C kernel that repeats.",
    .tp_basicsize = sizeof(Call),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Call, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_new = new,
    .tp_dealloc = dealloc,
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "hotloops._calls", .m_size = -1};

PyMODINIT_FUNC PyInit__calls(void)
{
    PyObject *m = PyModule_Create(&module);
    if (m && PyModule_AddType(m, &call_type)) Py_CLEAR(m);
    return m;
}
