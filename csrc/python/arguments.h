/* What every function of oplora._core does with its arguments: errors that say what, where and how to mend; arrays that are
 * checked and never converted; numbers. Internal. */
#ifndef OPLORA_ARGUMENTS_H
#define OPLORA_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL oplora_numpy /* core_module.c imports NumPy for both */
#include <numpy/arrayobject.h>

#include "../core/oplora_core.h"

enum { ANY_FLOAT = -1 }; /* float32 or float64 */

/* The buffers that arrays lie in which own no memory, exported until the call is done: they neither move nor end. */
enum { MOST_ARRAYS = 5 };

typedef struct {
    PyObject *value_error, *type_error; /* oplora.errors.OPLoRAValueError, OPLoRATypeError */
} module_state;

/* The call in progress, for its error messages. */
typedef struct {
    const module_state *errors;
    const char *function;
} call;

typedef struct {
    Py_buffer views[MOST_ARRAYS];
    int count;
} held;

/* A generator's arrays, all of one type, and its sizes. */
typedef struct {
    PyArrayObject *z, *W1, *c1, *W2;
    int type;
    oplora_layout layout;
    npy_intp H, Z, N;
} generator;

/* The ranges of rows that start at random. */
typedef struct {
    oplora_rows rows[OPLORA_MOST_RANGES];
    Py_ssize_t count;
} ranges;

int expect_generator(const call *c, generator *g, PyObject *z, PyObject *W1, PyObject *c1, PyObject *W2);
int expect_rows_within(const call *c, const ranges *r, npy_intp N);
/* N from length = H N + N + H Z + H + Z, or -1. */
npy_intp rows_of_length(npy_intp length, Py_ssize_t H, Py_ssize_t Z);
call begin(PyObject *module, const char *function);
void raise_shape(const call *c, PyArrayObject *a, const char *name, const char *expected);
/* 0, or -1 with the status as an exception. The checks here leave little to the core's own. */
int forward(const call *c, oplora_status status);
/* The array behind `o` if it has the type and the number of dimensions, else NULL with an exception. */
PyArrayObject *array(const call *c, PyObject *o, const char *name, int ndim, int type);
int expect_contiguous(const call *c, PyArrayObject *a, const char *name);
int expect_writable(const call *c, PyArrayObject *a, const char *name);
PyArrayObject *vector(const call *c, PyObject *o, const char *name, int type);
PyArrayObject *vector_of(const call *c, PyObject *o, const char *name, int type, npy_intp length, const char *meaning);
PyArrayObject *matrix(const call *c, PyObject *o, const char *name, int type);
PyArrayObject *new_array(npy_intp rows, npy_intp columns, int type);
void release(held *h);
/* 0, or -1 with an exception and nothing held. */
int hold(const call *c, held *h, int n, PyObject *const *objects, char *const *names);
/* An unsigned integer up to `most` from any object with __index__. */
int unsigned_of(const call *c, PyObject *o, const char *name, unsigned long long most, unsigned long long *out);
/* From a sequence of pairs of integers; where their rows may lie is checked once N is known. */
int ranges_of(const call *c, PyObject *sequence, ranges *r);
/* Fills words (count) from a sequence of that many integers below 2^32. */
int words_of(const call *c, PyObject *sequence, const char *name, Py_ssize_t count, uint32_t *words);

#endif
