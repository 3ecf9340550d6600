/* arguments: see arguments.h. */
#define NO_IMPORT_ARRAY
#include "arguments.h"

#include <string.h>

/* ---- errors: what, where, how to mend ---- */

call begin(PyObject *module, const char *function) { return (call){PyModule_GetState(module), function}; }

void raise_shape(const call *c, PyArrayObject *a, const char *name, const char *expected) {
    PyObject *const shape = PyObject_GetAttrString((PyObject *)a, "shape");
    if (!shape) return;
    PyErr_Format(c->errors->value_error, "oplora.%s: %s has shape %R, expected %s.", c->function, name, shape,
                 expected);
    Py_DECREF(shape);
}

int forward(const call *c, oplora_status status) {
    if (status == OPLORA_OK) return 0;
    PyErr_Format(c->errors->value_error, "oplora.%s: %s.", c->function, oplora_strerror(status));
    return -1;
}

/* ---- arguments ---- */

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

PyArrayObject *array(const call *c, PyObject *o, const char *name, int ndim, int type) {
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

int expect_contiguous(const call *c, PyArrayObject *a, const char *name) {
    if (PyArray_IS_C_CONTIGUOUS(a) && PyArray_ISALIGNED(a)) return 0;
    PyErr_Format(c->errors->value_error,
                 "oplora.%s: %s has gaps, another order or unaligned memory, expected a C-contiguous array. "
                 "Copy it with numpy.ascontiguousarray(%s) or %s.copy().",
                 c->function, name, name, name);
    return -1;
}

int expect_writable(const call *c, PyArrayObject *a, const char *name) {
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

PyArrayObject *vector(const call *c, PyObject *o, const char *name, int type) {
    PyArrayObject *const a = array(c, o, name, 1, type);
    return a && !expect_contiguous(c, a, name) ? a : NULL;
}

PyArrayObject *vector_of(const call *c, PyObject *o, const char *name, int type, npy_intp length, const char *meaning) {
    PyArrayObject *const a = vector(c, o, name, type);
    return a && !expect_length(c, a, name, length, meaning) ? a : NULL;
}

PyArrayObject *matrix(const call *c, PyObject *o, const char *name, int type) {
    PyArrayObject *const a = array(c, o, name, 2, type);
    return a && !expect_contiguous(c, a, name) ? a : NULL;
}

PyArrayObject *new_array(npy_intp rows, npy_intp columns, int type) {
    npy_intp shape[2] = {rows, columns};
    return (PyArrayObject *)PyArray_SimpleNew(columns < 0 ? 1 : 2, shape, type);
}

void release(held *h) {
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

int hold(const call *c, held *h, int n, PyObject *const *objects, char *const *names) {
    h->count = 0;
    for (int i = 0; i < n; i++)
        if (hold_one(c, h, objects[i], names[i])) return release(h), -1;
    return 0;
}

int expect_generator(const call *c, generator *g, PyObject *z, PyObject *W1, PyObject *c1, PyObject *W2) {
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

int unsigned_of(const call *c, PyObject *o, const char *name, unsigned long long most, unsigned long long *out) {
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

int ranges_of(const call *c, PyObject *sequence, ranges *r) {
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

int words_of(const call *c, PyObject *sequence, const char *name, Py_ssize_t count, uint32_t *words) {
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

int expect_rows_within(const call *c, const ranges *r, npy_intp N) {
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

npy_intp rows_of_length(npy_intp length, Py_ssize_t H, Py_ssize_t Z) {
    const int64_t least = oplora_size(H, Z, 1); /* of one row */
    if (least < 0) return -1;
    const int64_t rest = least - H - 1; /* H Z + H + Z */
    if (length <= rest || (length - rest) % (H + 1)) return -1;
    return (length - rest) / (H + 1);
}
