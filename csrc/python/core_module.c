/* oplora._core: the C core on NumPy arrays, without torch. CPython's limited API and NumPy's C API.
 *
 * Each function checks its arguments, allocates what it returns and the core's workspace (with the GIL: the
 * limited API of 3.11 has no PyMem_RawMalloc), and calls the core without the GIL. Arrays are checked and
 * never converted: a silent copy of W2 would be the whole cost of a call.
 *
 * Any conversion of an argument may run user code (__index__, __len__, __buffer__), and that may resize an array or end the
 * memory that it lies in. So a function converts all numbers first, then holds what its arrays lie in, and then takes sizes
 * and pointers. */
#include "arguments.h"

#include <float.h>
#include <math.h>
#include <string.h>

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
    if (!(fabs(scaling) <= FLT_MAX))
        return PyErr_Format(c->errors->value_error,
                            "oplora.merge: scaling is infinite, NaN or beyond float32, expected alpha / r.");
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
