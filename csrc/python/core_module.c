/* oplora._core: the C core on NumPy arrays, without torch. CPython's limited API and NumPy's C API.
 *
 * Each function checks its arguments, allocates what it returns and the core's workspace (with the GIL: the
 * limited API of 3.11 has no PyMem_RawMalloc), and calls the core without the GIL. Arrays are checked and
 * never converted: a silent copy of W2 would be the whole cost of a call.
 *
 * Any conversion of an argument may run user code (__index__, __len__, __buffer__), and that may resize an array or end the
 * memory that it lies in. So a function converts all numbers first, then holds what its arrays lie in, and then takes sizes
 * and pointers. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#include <numpy/arrayobject.h>

#include <math.h>
#include <string.h>

#include "../core/oplora_core.h"

/* ---- errors: what, where, how to mend ---- */

typedef struct {
    PyObject *value_error, *type_error; /* oplora.errors.OPLoRAValueError, OPLoRATypeError */
} module_state;

/* The call in progress, for its error messages. */
typedef struct {
    const module_state *errors;
    const char *function;
} call;

static call begin(PyObject *module, const char *function) { return (call){PyModule_GetState(module), function}; }

static void raise_shape(const call *c, PyArrayObject *a, const char *name, const char *expected) {
    PyObject *const shape = PyObject_GetAttrString((PyObject *)a, "shape");
    if (!shape) return;
    PyErr_Format(c->errors->value_error, "oplora.%s: %s has shape %R, expected %s.", c->function, name, shape,
                 expected);
    Py_DECREF(shape);
}

/* 0, or -1 with the status as an exception. The checks here leave little to the core's own. */
static int forward(const call *c, oplora_status status) {
    if (status == OPLORA_OK) return 0;
    PyErr_Format(c->errors->value_error, "oplora.%s: %s.", c->function, oplora_strerror(status));
    return -1;
}

/* ---- arguments ---- */

enum { ANY_FLOAT = -1 }; /* float32 or float64 */

static const char *type_name(int type) {
    switch (type) {
    case NPY_FLOAT32:
        return "float32";
    case NPY_FLOAT64:
        return "float64";
    case NPY_FLOAT16:
        return "float16";
    case NPY_UINT16:
        return "uint16";
    }
    return "float32 or float64";
}

/* The array behind `o` if it has the type and the number of dimensions, else NULL with an exception. */
static PyArrayObject *array(const call *c, PyObject *o, const char *name, int ndim, int type) {
    if (!PyArray_Check(o)) {
        PyErr_Format(c->errors->type_error, "oplora.%s: %s is a %R, expected a numpy.ndarray of %s. Convert it first.",
                     c->function, name, (PyObject *)Py_TYPE(o), type_name(type));
        return NULL;
    }
    PyArrayObject *const a = (PyArrayObject *)o;
    const int got = PyArray_TYPE(a);
    if (type == ANY_FLOAT ? got != NPY_FLOAT32 && got != NPY_FLOAT64 : got != type) {
        PyErr_Format(c->errors->type_error, "oplora.%s: %s has dtype %S, expected %s. %s", c->function, name,
                     (PyObject *)PyArray_DESCR(a), type_name(type),
                     type == NPY_UINT16 ? "Pass bfloat16 as its bits (a view, not a conversion)."
                                        : "Convert it with astype().");
        return NULL;
    }
    if (ndim >= 0 && PyArray_NDIM(a) != ndim) {
        raise_shape(c, a, name, ndim == 1 ? "one dimension" : "two dimensions");
        return NULL;
    }
    if (!PyArray_ISNOTSWAPPED(a)) {
        PyErr_Format(c->errors->type_error,
                     "oplora.%s: %s has the other byte order, expected the machine's own. "
                     "Convert it with %s.astype(%s.dtype.newbyteorder('=')).",
                     c->function, name, name, name);
        return NULL;
    }
    return a;
}

static int expect_contiguous(const call *c, PyArrayObject *a, const char *name) {
    if (PyArray_IS_C_CONTIGUOUS(a) && PyArray_ISALIGNED(a)) return 0;
    PyErr_Format(c->errors->value_error,
                 "oplora.%s: %s has gaps, another order or unaligned memory, expected a C-contiguous array. "
                 "Copy it with numpy.ascontiguousarray(%s) or %s.copy().",
                 c->function, name, name, name);
    return -1;
}

static int expect_writable(const call *c, PyArrayObject *a, const char *name) {
    if (PyArray_ISWRITEABLE(a)) return 0;
    PyErr_Format(c->errors->value_error, "oplora.%s: %s is read-only and would be written. Pass a writable copy.",
                 c->function, name);
    return -1;
}

static int expect_length(const call *c, PyArrayObject *a, const char *name, npy_intp length, const char *meaning) {
    if (PyArray_DIM(a, 0) == length) return 0;
    PyErr_Format(c->errors->value_error, "oplora.%s: %s has %zd entries, expected %zd = %s.", c->function, name,
                 (Py_ssize_t)PyArray_DIM(a, 0), (Py_ssize_t)length, meaning);
    return -1;
}

static PyArrayObject *vector(const call *c, PyObject *o, const char *name, int type) {
    PyArrayObject *const a = array(c, o, name, 1, type);
    return a && !expect_contiguous(c, a, name) ? a : NULL;
}

static PyArrayObject *vector_of(const call *c, PyObject *o, const char *name, int type, npy_intp length,
                                const char *meaning) {
    PyArrayObject *const a = vector(c, o, name, type);
    return a && !expect_length(c, a, name, length, meaning) ? a : NULL;
}

static PyArrayObject *matrix(const call *c, PyObject *o, const char *name, int type) {
    PyArrayObject *const a = array(c, o, name, 2, type);
    return a && !expect_contiguous(c, a, name) ? a : NULL;
}

static PyArrayObject *new_array(npy_intp rows, npy_intp columns, int type) {
    npy_intp shape[2] = {rows, columns};
    return (PyArrayObject *)PyArray_SimpleNew(columns < 0 ? 1 : 2, shape, type);
}

/* The buffers that arrays lie in which own no memory, exported until the call is done: they neither move nor end. */
enum { MOST_ARRAYS = 5 };
typedef struct {
    Py_buffer views[MOST_ARRAYS];
    int count;
} held;

static void release(held *h) {
    while (h->count > 0) PyBuffer_Release(&h->views[--h->count]);
}

static int raise_gone(const call *c, const char *name) {
    PyErr_Clear();
    PyErr_Format(c->errors->value_error,
                 "oplora.%s: the buffer that %s lies in was released, closed or resized. Make %s anew.", c->function,
                 name, name);
    return -1;
}

static int hold_one(const call *c, held *h, PyObject *o, const char *name) {
    if (!PyArray_Check(o)) return 0;
    PyArrayObject *const a = (PyArrayObject *)o;
    PyObject *root = o; /* the array that owns the memory, or what an array lies in that is none */
    while (PyArray_Check(root) && PyArray_BASE((PyArrayObject *)root)) root = PyArray_BASE((PyArrayObject *)root);
    if (root == o || !PyObject_CheckBuffer(root)) return 0;
    Py_buffer *const view = &h->views[h->count];
    if (PyObject_GetBuffer(root, view, PyBUF_FULL_RO)) {
        if (!PyArray_Check(root)) return raise_gone(c, name);
        PyErr_Clear(); /* a dtype that buffers don't know, of which this is a view */
        return 0;
    }
    h->count++;
    const char *const first = PyArray_DATA(a), *const begin = view->buf;
    const int whole = PyBuffer_IsContiguous(view, 'A') && (PyArray_IS_C_CONTIGUOUS(a) || PyArray_IS_F_CONTIGUOUS(a));
    if (whole && (first < begin || first + PyArray_NBYTES(a) > begin + view->len)) return raise_gone(c, name);
    return 0;
}

/* 0, or -1 with an exception and nothing held. */
static int hold(const call *c, held *h, int n, PyObject *const *objects, char *const *names) {
    h->count = 0;
    for (int i = 0; i < n; i++)
        if (hold_one(c, h, objects[i], names[i])) return release(h), -1;
    return 0;
}

/* A generator's arrays, all of one type, and its sizes. */
typedef struct {
    PyArrayObject *z, *W1, *c1, *W2;
    int type;
    oplora_layout layout;
    npy_intp H, Z, N;
} generator;

static int expect_generator(const call *c, generator *g, PyObject *z, PyObject *W1, PyObject *c1, PyObject *W2) {
    if (!(g->W2 = array(c, W2, "W2", 2, ANY_FLOAT))) return -1;
    g->type = PyArray_TYPE(g->W2);
    g->N = PyArray_DIM(g->W2, 0);
    g->H = PyArray_DIM(g->W2, 1);
    if (!(PyArray_IS_C_CONTIGUOUS(g->W2) || PyArray_IS_F_CONTIGUOUS(g->W2)) || !PyArray_ISALIGNED(g->W2)) {
        PyErr_Format(c->errors->value_error,
                     "oplora.%s: W2 is neither C- nor Fortran-contiguous. Copy it with numpy.asfortranarray(W2).",
                     c->function);
        return -1;
    }
    g->layout = PyArray_IS_F_CONTIGUOUS(g->W2) ? OPLORA_COLUMNS : OPLORA_ROWS;
    if (!(g->W1 = matrix(c, W1, "W1", g->type))) return -1;
    g->Z = PyArray_DIM(g->W1, 1);
    if (PyArray_DIM(g->W1, 0) != g->H) {
        raise_shape(c, g->W1, "W1", "(H, Z) with H = the columns of W2 (N, H)");
        return -1;
    }
    if (!(g->z = vector_of(c, z, "z", g->type, g->Z, "Z, the columns of W1 (H, Z)"))) return -1;
    if (!(g->c1 = vector_of(c, c1, "c1", g->type, g->H, "H, the columns of W2 (N, H)"))) return -1;
    return 0;
}

/* ---- generate ---- */

PyDoc_STRVAR(generate_doc,
             "generate(z, W1, c1, W2, c2)\n--\n\n"
             "The entries of a layer's factors: v = W2 ReLU(W1 z + c1) + c2.\n"
             "\n"
             "z (Z,), W1 (H, Z), c1 (H,), W2 (N, H), c2 (N,): all float32 or all float64, C-contiguous. W2 may\n"
             "also be Fortran-contiguous, which is faster: the columns of units that are off are not read.\n"
             "Returns v (N,) of the same dtype.");
static PyObject *generate_held(const call *c, PyObject *const *arrays) {
    generator g;
    if (expect_generator(c, &g, arrays[0], arrays[1], arrays[2], arrays[3])) return NULL;
    PyArrayObject *const shift = vector_of(c, arrays[4], "c2", g.type, g.N, "N, the rows of W2 (N, H)");
    if (!shift) return NULL;

    PyArrayObject *const v = new_array(g.N, -1, g.type), *const h = new_array(g.H, -1, g.type);
    oplora_status status = OPLORA_OK;
    if (v && h) {
        PyThreadState *const thread = PyEval_SaveThread();
        if (g.type == NPY_FLOAT32)
            status = oplora_generate_f32(PyArray_DATA(g.z), PyArray_DATA(g.W1), PyArray_DATA(g.c1), PyArray_DATA(g.W2),
                                         PyArray_DATA(shift), g.layout, g.H, g.Z, g.N, PyArray_DATA(h), PyArray_DATA(v),
                                         NULL);
        else
            status = oplora_generate_f64(PyArray_DATA(g.z), PyArray_DATA(g.W1), PyArray_DATA(g.c1), PyArray_DATA(g.W2),
                                         PyArray_DATA(shift), g.layout, g.H, g.Z, g.N, PyArray_DATA(h), PyArray_DATA(v),
                                         NULL);
        PyEval_RestoreThread(thread);
    }
    const int failed = !v || !h || forward(c, status);
    Py_XDECREF((PyObject *)h);
    if (!failed) return (PyObject *)v;
    Py_XDECREF((PyObject *)v);
    return NULL;
}

static PyObject *generate(PyObject *self, PyObject *args, PyObject *kw) {
    static char *names[] = {"z", "W1", "c1", "W2", "c2", NULL};
    const call c = begin(self, "generate");
    PyObject *a[5];
    held h;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOO:generate", names, &a[0], &a[1], &a[2], &a[3], &a[4])) return NULL;
    if (hold(&c, &h, 5, a, names)) return NULL;
    PyObject *const result = generate_held(&c, a);
    release(&h);
    return result;
}

PyDoc_STRVAR(generate_backward_doc,
             "generate_backward(g, z, W1, c1, W2)\n--\n\n"
             "The gradients of generate from g = dL/dv (N,): the tuple (dz (Z,), dW1 (H, Z), dc1 (H,), h (H,)).\n"
             "\n"
             "z (Z,), W1 (H, Z), c1 (H,), W2 (N, H) as for generate. dW2 = numpy.outer(g, h) has rank one and is\n"
             "not formed; dc2 = g.");
static PyObject *generate_backward_held(const call *c, PyObject *const *arrays) {
    generator g;
    if (expect_generator(c, &g, arrays[1], arrays[2], arrays[3], arrays[4])) return NULL;
    PyArrayObject *const dv = vector_of(c, arrays[0], "g", g.type, g.N, "N, the rows of W2 (N, H)");
    if (!dv) return NULL;
    const int64_t bytes = oplora_generate_backward_workspace_bytes(g.H, g.Z, g.N);
    if (bytes < 0) return forward(c, OPLORA_ESIZE), NULL;

    PyArrayObject *const dz = new_array(g.Z, -1, g.type), *const dW1 = new_array(g.H, g.Z, g.type);
    PyArrayObject *const dc1 = new_array(g.H, -1, g.type), *const h = new_array(g.H, -1, g.type);
    void *const workspace = PyMem_Malloc((size_t)bytes);
    const int allocated = dz && dW1 && dc1 && h && workspace;
    oplora_status status = OPLORA_OK;
    if (allocated) {
        PyThreadState *const thread = PyEval_SaveThread();
        if (g.type == NPY_FLOAT32)
            status = oplora_generate_backward_f32(PyArray_DATA(dv), PyArray_DATA(g.z), PyArray_DATA(g.W1),
                                                  PyArray_DATA(g.c1), PyArray_DATA(g.W2), g.layout, g.H, g.Z, g.N,
                                                  PyArray_DATA(dz), PyArray_DATA(dW1), PyArray_DATA(dc1),
                                                  PyArray_DATA(h), workspace, NULL);
        else
            status = oplora_generate_backward_f64(PyArray_DATA(dv), PyArray_DATA(g.z), PyArray_DATA(g.W1),
                                                  PyArray_DATA(g.c1), PyArray_DATA(g.W2), g.layout, g.H, g.Z, g.N,
                                                  PyArray_DATA(dz), PyArray_DATA(dW1), PyArray_DATA(dc1),
                                                  PyArray_DATA(h), workspace, NULL);
        PyEval_RestoreThread(thread);
    } else if (!PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    PyMem_Free(workspace);
    PyObject *const result = allocated && !forward(c, status) ? PyTuple_Pack(4, (PyObject *)dz, dW1, dc1, h) : NULL;
    Py_XDECREF((PyObject *)dz);
    Py_XDECREF((PyObject *)dW1);
    Py_XDECREF((PyObject *)dc1);
    Py_XDECREF((PyObject *)h);
    return result;
}

static PyObject *generate_backward(PyObject *self, PyObject *args, PyObject *kw) {
    static char *names[] = {"g", "z", "W1", "c1", "W2", NULL};
    const call c = begin(self, "generate_backward");
    PyObject *a[5];
    held h;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOO:generate_backward", names, &a[0], &a[1], &a[2], &a[3], &a[4]))
        return NULL;
    if (hold(&c, &h, 5, a, names)) return NULL;
    PyObject *const result = generate_backward_held(&c, a);
    release(&h);
    return result;
}

/* ---- the seeded start ---- */

/* An unsigned integer up to `most` from any object with __index__. */
static int unsigned_of(const call *c, PyObject *o, const char *name, unsigned long long most, unsigned long long *out) {
    PyObject *const integer = PyNumber_Index(o);
    if (!integer) return -1;
    *out = PyLong_AsUnsignedLongLong(integer);
    Py_DECREF(integer);
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
    if (!PyErr_Occurred() && *out <= most) return 0;
    PyErr_Clear();
    PyErr_Format(c->errors->value_error, "oplora.%s: %s is %R, expected an integer from 0 to %llu.", c->function, name,
                 o, most);
    return -1;
}

/* item[index] as a row number; what passes 2^63 is clipped, and so out of range as well. */
static int row_of(PyObject *item, Py_ssize_t index, int64_t *row) {
    PyObject *const o = PySequence_GetItem(item, index);
    if (!o) return -1;
    *row = PyNumber_AsSsize_t(o, NULL);
    Py_DECREF(o);
    return PyErr_Occurred() ? -1 : 0;
}

/* The ranges of rows that start at random. */
typedef struct {
    oplora_rows rows[OPLORA_MOST_RANGES];
    Py_ssize_t count;
} ranges;

/* From a sequence of pairs of integers; where their rows may lie is checked once N is known. */
static int ranges_of(const call *c, PyObject *sequence, ranges *r) {
    r->count = PySequence_Size(sequence);
    if (r->count < 0) return -1;
    if (r->count > OPLORA_MOST_RANGES) {
        PyErr_Format(c->errors->value_error,
                     "oplora.%s: random has %zd ranges, expected at most %d. Join ranges that follow each other.",
                     c->function, r->count, OPLORA_MOST_RANGES);
        return -1;
    }
    for (Py_ssize_t i = 0; i < r->count; i++) {
        PyObject *const pair = PySequence_GetItem(sequence, i);
        if (!pair) return -1;
        const int is_pair = PySequence_Check(pair) && PySequence_Size(pair) == 2;
        if (!is_pair && !PyErr_Occurred())
            PyErr_Format(c->errors->value_error, "oplora.%s: random[%zd] is %R, expected rows (begin, end).",
                         c->function, i, pair);
        const int failed = !is_pair || row_of(pair, 0, &r->rows[i].begin) || row_of(pair, 1, &r->rows[i].end);
        Py_DECREF(pair);
        if (failed) return -1;
    }
    return 0;
}

static int expect_rows_within(const call *c, const ranges *r, npy_intp N) {
    for (Py_ssize_t i = 0; i < r->count; i++) {
        const oplora_rows rows = r->rows[i];
        if (rows.begin >= 0 && rows.begin <= rows.end && rows.end <= N) continue;
        PyErr_Format(c->errors->value_error,
                     "oplora.%s: random[%zd] is (%lld, %lld), expected rows (begin, end) with 0 <= begin <= end "
                     "<= N = %zd.",
                     c->function, i, (long long)rows.begin, (long long)rows.end, (Py_ssize_t)N);
        return -1;
    }
    return 0;
}

/* N from length = H N + N + H Z + H + Z, or -1. */
static npy_intp rows_of_length(npy_intp length, Py_ssize_t H, Py_ssize_t Z) {
    const int64_t least = oplora_size(H, Z, 1); /* of one row */
    if (least < 0) return -1;
    const int64_t rest = least - H - 1; /* H Z + H + Z */
    if (length <= rest || (length - rest) % (H + 1)) return -1;
    return (length - rest) / (H + 1);
}

PyDoc_STRVAR(
    start_doc,
    "start(out, *, hidden_width, latent_width, seed, layer, latent_std, random, start)\n--\n\n"
    "Writes the paper's seeded start into one layer's flat generator parameters, which are all zero.\n"
    "\n"
    "out: 1-D, writable, float32 or float64, of H N + N + H Z + H + Z zeros: W2 as H columns of N, c2,\n"
    "W1, c1, z, with H = hidden_width and Z = latent_width; N follows from the length. random: at most\n"
    "31 pairs (begin, end), the rows of W2 that start at U(-1/sqrt(H), 1/sqrt(H)) or, with start \"sign\", at\n"
    "+-1/sqrt(3 H). W1 starts at U(-1/sqrt(Z), 1/sqrt(Z)) and z at N(0, latent_std^2). All the rest is not\n"
    "touched and stays zero.\n"
    "The numbers depend on seed (0 to 2^64 - 1), layer (0 to 2^32 - 1) and their place alone.");
static PyObject *start_held(const call *c, PyObject *out_, Py_ssize_t H, Py_ssize_t Z, uint64_t seed, uint32_t layer,
                            double latent_std, oplora_start_kind kind, const ranges *random) {
    PyArrayObject *const out = vector(c, out_, "out", ANY_FLOAT);
    if (!out || expect_writable(c, out, "out")) return NULL;
    const npy_intp N = rows_of_length(PyArray_DIM(out, 0), H, Z);
    if (N < 1)
        return PyErr_Format(c->errors->value_error,
                            "oplora.start: out has %zd entries, which is no H N + N + H Z + H + Z for "
                            "hidden_width H = %zd and latent_width Z = %zd with whole sizes of at least 1.",
                            (Py_ssize_t)PyArray_DIM(out, 0), H, Z);
    if (expect_rows_within(c, random, N)) return NULL;
    void *const to = PyArray_DATA(out);
    const int is_float = PyArray_TYPE(out) == NPY_FLOAT32;
    oplora_status status;
    PyThreadState *const thread = PyEval_SaveThread();
    if (is_float)
        status = oplora_start_f32(to, H, Z, N, seed, layer, latent_std, kind, random->rows, random->count, NULL);
    else
        status = oplora_start_f64(to, H, Z, N, seed, layer, latent_std, kind, random->rows, random->count, NULL);
    PyEval_RestoreThread(thread);
    if (forward(c, status)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *start(PyObject *self, PyObject *args, PyObject *kw) {
    static char *names[] = {"out",        "hidden_width", "latent_width", "seed", "layer",
                            "latent_std", "random",       "start",        NULL};
    const call c = begin(self, "start");
    PyObject *out, *seed_, *layer_, *random_, *kind_;
    Py_ssize_t H, Z;
    double latent_std;
    unsigned long long seed, layer;
    ranges random;
    held h;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O$nnOOdOU:start", names, &out, &H, &Z, &seed_, &layer_, &latent_std,
                                     &random_, &kind_))
        return NULL;
    if (unsigned_of(&c, seed_, "seed", UINT64_MAX, &seed) || unsigned_of(&c, layer_, "layer", UINT32_MAX, &layer))
        return NULL;
    if (!(latent_std >= 0 && latent_std < INFINITY))
        return PyErr_Format(c.errors->value_error, "oplora.start: latent_std is negative, infinite or NaN, expected a "
                                                   "standard deviation such as 0.01.");
    const int signs = PyUnicode_CompareWithASCIIString(kind_, "sign") == 0;
    if (!signs && PyUnicode_CompareWithASCIIString(kind_, "uniform"))
        return PyErr_Format(c.errors->value_error, "oplora.start: start is %R, expected 'uniform' or 'sign'.", kind_);
    if (ranges_of(&c, random_, &random) || hold(&c, &h, 1, &out, names)) return NULL;
    PyObject *const result =
        start_held(&c, out, H, Z, seed, (uint32_t)layer, latent_std, signs ? OPLORA_SIGN : OPLORA_UNIFORM, &random);
    release(&h);
    return result;
}

/* Fills words (count) from a sequence of that many integers below 2^32. */
static int words_of(const call *c, PyObject *sequence, const char *name, Py_ssize_t count, uint32_t *words) {
    const Py_ssize_t length = PySequence_Size(sequence);
    if (length < 0) return -1;
    if (length != count) {
        PyErr_Format(c->errors->value_error, "oplora.%s: %s has %zd words, expected %zd.", c->function, name, length,
                     count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        unsigned long long word;
        PyObject *const o = PySequence_GetItem(sequence, i);
        const int failed = !o || unsigned_of(c, o, name, UINT32_MAX, &word);
        Py_XDECREF(o);
        if (failed) return -1;
        words[i] = (uint32_t)word;
    }
    return 0;
}

PyDoc_STRVAR(philox_doc,
             "philox(counter, key)\n--\n\n"
             "Philox 4x32-10, which the seeded start draws from: four random words from a counter of four words\n"
             "and a key of two, all of them ints below 2^32.");
static PyObject *philox(PyObject *self, PyObject *args, PyObject *kw) {
    static char *names[] = {"counter", "key", NULL};
    const call c = begin(self, "philox");
    PyObject *counter_, *key_;
    uint32_t counter[4], key[2], out[4];
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO:philox", names, &counter_, &key_)) return NULL;
    if (words_of(&c, counter_, "counter", 4, counter) || words_of(&c, key_, "key", 2, key)) return NULL;
    oplora_philox4x32_10(counter, key, out);
    return Py_BuildValue("(kkkk)", (unsigned long)out[0], (unsigned long)out[1], (unsigned long)out[2],
                         (unsigned long)out[3]);
}

/* ---- merge and round ---- */

/* A checkpoint's dtype, and the NumPy type that holds its bits: NumPy has no bfloat16. */
static const struct {
    const char *name;
    oplora_dtype dtype;
    int type;
} dtypes[] = {
    {"float32", OPLORA_F32, NPY_FLOAT32},
    {"float64", OPLORA_F64, NPY_FLOAT64},
    {"float16", OPLORA_F16, NPY_FLOAT16},
    {"bfloat16", OPLORA_BF16, NPY_UINT16},
};

static int dtype_of(const call *c, const char *name, oplora_dtype *dtype, int *type) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (!strcmp(dtypes[i].name, name)) return *dtype = dtypes[i].dtype, *type = dtypes[i].type, 0;
    PyErr_Format(c->errors->value_error,
                 "oplora.%s: dtype is '%s', expected 'float32', 'float64', 'float16' or 'bfloat16' (as uint16 bits).",
                 c->function, name);
    return -1;
}

PyDoc_STRVAR(merge_doc,
             "merge(W, A, B, scaling, *, dtype, transposed=False)\n--\n\n"
             "W += scaling B A in place, for A (r, in_features) and B (out_features, r) in float32.\n"
             "\n"
             "W: (out_features, in_features), or with transposed (in_features, out_features), as GPT-2's Conv1D\n"
             "keeps it; C-contiguous, writable, aligned or not; of dtype 'float32', 'float64', 'float16', or\n"
             "'bfloat16' as an array of uint16 bits. Sums in float32 (float64 for 'float64'), then one rounding\n"
             "to nearest even.");
static PyObject *merge_held(const call *c, PyObject *const *arrays, double scaling, oplora_dtype dtype, int type,
                            int transposed) {
    PyArrayObject *const W = array(c, arrays[0], "W", 2, type);
    if (!W || expect_writable(c, W, "W")) return NULL;
    if (!PyArray_IS_C_CONTIGUOUS(W)) return raise_shape(c, W, "W", "C-contiguous rows without gaps"), NULL;
    PyArrayObject *const A = matrix(c, arrays[1], "A", NPY_FLOAT32);
    if (!A) return NULL;
    PyArrayObject *const B = matrix(c, arrays[2], "B", NPY_FLOAT32);
    if (!B) return NULL;

    const npy_intp out_features = PyArray_DIM(W, transposed ? 1 : 0), in_features = PyArray_DIM(W, transposed ? 0 : 1);
    const npy_intp r = PyArray_DIM(A, 0);
    if (PyArray_DIM(A, 1) != in_features)
        return raise_shape(c, A, "A", transposed ? "(r, the rows of W)" : "(r, the columns of W)"), NULL;
    if (PyArray_DIM(B, 0) != out_features || PyArray_DIM(B, 1) != r)
        return raise_shape(c, B, "B",
                           transposed ? "(the columns of W, the rows of A)" : "(the rows of W, the rows of A)"),
               NULL;
    if (!isfinite(scaling))
        return PyErr_Format(c->errors->value_error, "oplora.merge: scaling is infinite or NaN, expected alpha / r.");
    const int64_t bytes = oplora_merge_workspace_bytes(PyArray_DIM(W, 1));
    if (bytes < 0) return forward(c, OPLORA_ESIZE), NULL;
    void *const workspace = PyMem_Malloc((size_t)bytes);
    if (!workspace) return PyErr_NoMemory();
    oplora_status status;
    PyThreadState *const thread = PyEval_SaveThread();
    status = oplora_merge(PyArray_DATA(W), dtype, PyArray_DATA(A), PyArray_DATA(B), scaling, out_features, in_features,
                          r, transposed, workspace);
    PyEval_RestoreThread(thread);
    PyMem_Free(workspace);
    if (forward(c, status)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *merge(PyObject *self, PyObject *args, PyObject *kw) {
    static char *names[] = {"W", "A", "B", "scaling", "dtype", "transposed", NULL};
    const call c = begin(self, "merge");
    PyObject *a[3];
    held h;
    double scaling;
    const char *name = NULL;
    int transposed = 0, type;
    oplora_dtype dtype;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOd|$sp:merge", names, &a[0], &a[1], &a[2], &scaling, &name,
                                     &transposed))
        return NULL;
    if (!name) return PyErr_Format(PyExc_TypeError, "merge() missing required keyword argument 'dtype'");
    if (dtype_of(&c, name, &dtype, &type)) return NULL;
    if (hold(&c, &h, 3, a, names)) return NULL;
    PyObject *const result = merge_held(&c, a, scaling, dtype, type, transposed);
    release(&h);
    return result;
}

PyDoc_STRVAR(round_doc,
             "round(values, dtype)\n--\n\n"
             "A new array: values (float32, C-contiguous, any shape) rounded once to dtype, to nearest even.\n"
             "\n"
             "dtype: 'float32', 'float64', 'float16', or 'bfloat16', which returns uint16 bits.");
static PyObject *round_held(const call *c, PyObject *values_, oplora_dtype dtype, int type) {
    PyArrayObject *const values = array(c, values_, "values", -1, NPY_FLOAT32);
    if (!values || expect_contiguous(c, values, "values")) return NULL;
    PyArrayObject *const out = (PyArrayObject *)PyArray_SimpleNew(PyArray_NDIM(values), PyArray_DIMS(values), type);
    if (!out) return NULL;
    oplora_status status;
    PyThreadState *const thread = PyEval_SaveThread();
    status = oplora_round(PyArray_DATA(values), PyArray_SIZE(values), dtype, PyArray_DATA(out));
    PyEval_RestoreThread(thread);
    if (!forward(c, status)) return (PyObject *)out;
    Py_DECREF(out);
    return NULL;
}

static PyObject *round_values(PyObject *self, PyObject *args, PyObject *kw) {
    static char *names[] = {"values", "dtype", NULL};
    const call c = begin(self, "round");
    PyObject *values_;
    const char *name;
    int type;
    held h;
    oplora_dtype dtype;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "Os:round", names, &values_, &name)) return NULL;
    if (dtype_of(&c, name, &dtype, &type)) return NULL;
    if (hold(&c, &h, 1, &values_, names)) return NULL;
    PyObject *const result = round_held(&c, values_, dtype, type);
    release(&h);
    return result;
}

PyDoc_STRVAR(isa_doc, "isa()\n--\n\nThe instruction set in use: 'base', 'avx2' or 'avx512'. OPLORA_ISA lowers it.");
static PyObject *isa(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(oplora_isa());
}

/* ---- the module ---- */

#define WITH_KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"generate", WITH_KEYWORDS(generate), generate_doc},
    {"generate_backward", WITH_KEYWORDS(generate_backward), generate_backward_doc},
    {"start", WITH_KEYWORDS(start), start_doc},
    {"philox", WITH_KEYWORDS(philox), philox_doc},
    {"merge", WITH_KEYWORDS(merge), merge_doc},
    {"round", WITH_KEYWORDS(round_values), round_doc},
    {"isa", isa, METH_NOARGS, isa_doc},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module) {
    module_state *const state = PyModule_GetState(module);
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    PyObject *const errors = PyImport_ImportModule("oplora.errors");
    if (!errors) return -1;
    state->value_error = PyObject_GetAttrString(errors, "OPLoRAValueError");
    state->type_error = PyObject_GetAttrString(errors, "OPLoRATypeError");
    Py_DECREF(errors);
    return state->value_error && state->type_error ? 0 : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    const module_state *const state = PyModule_GetState(module);
    Py_VISIT(state->value_error);
    Py_VISIT(state->type_error);
    return 0;
}

static int clear(PyObject *module) {
    module_state *const state = PyModule_GetState(module);
    Py_CLEAR(state->value_error);
    Py_CLEAR(state->type_error);
    return 0;
}

static void free_module(void *module) { clear(module); }

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)exec_module}, {0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                        "oplora._core",
                                        "The C core of oplora on NumPy arrays, without torch.",
                                        sizeof(module_state),
                                        methods,
                                        slots,
                                        traverse,
                                        clear,
                                        free_module};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
