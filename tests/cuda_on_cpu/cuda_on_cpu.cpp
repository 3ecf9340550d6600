// Runs the threads of CUDA blocks as fibres on the CPU and checks what they do. See cuda_on_cpu.h and README.md.
#include "cuda_on_cpu.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace cuda_on_cpu {

Options options;
Builtins self;

namespace {

// ---- switching stacks ----
#if FAST_SWITCH
extern "C" void cuda_on_cpu_switch(void **save, void *load);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
using Context = void *;
void switch_to(Context &from, Context &to) { cuda_on_cpu_switch(&from, to); }
void make_context(Context &c, char *stack, size_t bytes, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + bytes) - 1; // as if entry had just been called from address 0
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void *>(entry);
    std::fill(top - 7, top - 1, nullptr);
    c = top - 7;
}
#else
using Context = ucontext_t;
void switch_to(Context &from, Context &to) { swapcontext(&from, &to); }
void make_context(Context &c, char *stack, size_t bytes, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack;
    c.uc_stack.ss_size = bytes;
    c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
#endif

// ---- the state of the block that runs ----
enum class State { ready, at_barrier, in_warp, done };

struct Fibre {
    Context context;
    State state;
    uint3 index;
    unsigned number, lane, warp;
    const char *file; // where it waits
    int line;
    bool predicate;
    WarpOp op;
    unsigned mask;
    int source;
    uint64_t value, result;
    uint32_t clock[32]; // of its warp's lanes, as __syncwarp last told it
};

struct SharedArray {
    const void *key;
    const char *name;
    size_t offset, bytes;
};

constexpr size_t arena_bytes = 512 << 10, red_zone = 64;
alignas(128) char arena[arena_bytes]; // shared memory: the dynamic part first, then the static arrays

char *stacks = nullptr; // one slot per fibre: a guard page, then its stack
size_t stack_slots = 0, stack_slot = 0, page_bytes = 4096;
std::vector<Fibre> fibres;
std::vector<unsigned> in_warp_mask, in_warp_done; // per warp: lanes that wait, lanes that have left
Context scheduler;
Fibre *current = nullptr;
const std::function<void()> *body = nullptr;
std::vector<SharedArray> shared;
size_t shared_top, shared_used, dynamic_bytes; // shared_top counts red zones, shared_used does not
unsigned thread_count, at_barrier, predicate_count, last_count, done_count;
uint32_t barrier_epoch, block_serial, first_serial; // serial numbers tell the blocks of all launches apart
Fibre *first_at_barrier;
bool failed;
size_t reports;
std::set<std::pair<const void *, const void *>> told;
std::string report;
cudaError_t last_error = cudaSuccess;
uint64_t random_state;

void say(const char *format, ...) {
    char text[600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    report += text;
    report += '\n';
}

std::string who(const Fibre &f) {
    char text[80];
    snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", self.block.x, self.block.y, self.block.z,
             f.index.x, f.index.y, f.index.z);
    return text;
}

#if defined(__SANITIZE_ADDRESS__)
const void *scheduler_stack;
size_t scheduler_stack_bytes;
#endif

// Not sanitised: a finished fibre never returns from here, and would leave its frame's red zones behind.
__attribute__((no_sanitize("address"))) void to_scheduler() {
    Fibre *f = current;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(f->state == State::done ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
    switch_to(f->context, scheduler);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    switch_to(f->context, scheduler);
#endif
}

// Ends the launch from inside a fibre; the block's stacks are simply dropped.
[[noreturn]] void fail() {
    failed = true;
    to_scheduler();
    abort(); // never resumed
}

void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*body)();
    current->state = State::done;
    to_scheduler();
}

char *stack_of(size_t i) { return stacks + i * stack_slot + page_bytes; }

__attribute__((no_sanitize("address"))) void resume(Fibre &f) {
    current = &f;
    self.thread = f.index;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_of(f.number), stack_slot - page_bytes);
    switch_to(scheduler, f.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    switch_to(scheduler, f.context);
#endif
    current = nullptr;
}

void reserve_stacks(size_t count) {
    page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t slot = (options.stack_bytes + page_bytes - 1) / page_bytes * page_bytes + page_bytes;
    if (count <= stack_slots && slot == stack_slot) return;
    if (stacks) munmap(stacks, stack_slots * stack_slot);
    void *p = mmap(nullptr, count * slot, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<char *>(p);
    stack_slots = count;
    stack_slot = slot;
    for (size_t i = 0; i < count; i++) mprotect(stacks + i * slot, page_bytes, PROT_NONE);
}

uint64_t next_random() { // splitmix64
    uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void arrange(std::vector<unsigned> &order) {
    if (options.order == Order::random)
        for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
}

std::vector<unsigned> initial_order(size_t n) {
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    if (options.order == Order::reverse) std::reverse(order.begin(), order.end());
    return order;
}

void explain_deadlock() {
    say("block (%u,%u,%u): deadlock: %u of %u threads have returned, the others wait", self.block.x, self.block.y,
        self.block.z, done_count, thread_count);
    std::string last;
    for (const Fibre &f : fibres) { // one line per place, with the first thread that waits there
        if (f.number >= thread_count || f.state == State::done) continue;
        char place[400];
        snprintf(place, sizeof place, "%s at %s:%d", f.state == State::at_barrier ? "block barrier" : "warp collective",
                 f.file, f.line);
        if (last != place) say("  from %s: at a %s", who(f).c_str(), place);
        last = place;
    }
}

void run_block(std::vector<unsigned> &order) {
    ASAN_UNPOISON_MEMORY_REGION(arena, arena_bytes);
    std::memset(arena, 0xff, shared_top);
    ASAN_POISON_MEMORY_REGION(arena, arena_bytes);
    ASAN_UNPOISON_MEMORY_REGION(arena, dynamic_bytes);
    shared.clear();
    shared_top = (dynamic_bytes + red_zone + 127) / 128 * 128;
    shared_used = dynamic_bytes;
    at_barrier = predicate_count = done_count = barrier_epoch = 0;
    block_serial++;
    std::fill(in_warp_mask.begin(), in_warp_mask.end(), 0u);
    std::fill(in_warp_done.begin(), in_warp_done.end(), 0u);
    for (unsigned i = 0; i < thread_count; i++) {
        Fibre &f = fibres[i];
        f.state = State::ready;
        std::memset(f.clock, 0, sizeof f.clock);
        f.clock[f.lane] = 1;
        const size_t spread = i % 64 * 64; // stacks that all start at one cache set would evict each other
        make_context(f.context, stack_of(i), stack_slot - page_bytes - spread, fibre_main);
    }
    while (done_count < thread_count && !failed) {
        bool moved = false;
        arrange(order);
        for (unsigned i : order) {
            Fibre &f = fibres[i];
            if (f.state != State::ready) continue;
            moved = true;
            resume(f);
            if (failed) break;
            if (f.state == State::done) {
                done_count++;
                in_warp_done[f.warp] |= 1u << f.lane;
            }
        }
        if (!moved) {
            explain_deadlock();
            failed = true;
        }
    }
    if (failed) ASAN_UNPOISON_MEMORY_REGION(stacks, stack_slots * stack_slot);
}

} // namespace

std::string take_report() {
    std::string text;
    text.swap(report);
    return text;
}

unsigned lane() { return current->lane; }

static void forget_old_accesses();

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const void *kernel, const std::function<void()> &work) {
    static std::recursive_mutex one_at_a_time;
    const std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
    if (current) throw std::logic_error("a kernel launched a kernel");
    const size_t said = report.size();
    const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (!threads || threads > 1024 || block.z > 64 || !blocks || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535 || shared_bytes > options.shared_limit) {
        say("launch refused: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic shared memory", grid.x, grid.y,
            grid.z, block.x, block.y, block.z, shared_bytes);
        fputs(report.c_str() + said, stderr);
        return last_error = cudaErrorInvalidConfiguration;
    }
    thread_count = static_cast<unsigned>(threads);
    reserve_stacks(thread_count);
    if (fibres.size() < thread_count) fibres.resize(thread_count);
    in_warp_mask.assign((thread_count + 31) / 32, 0);
    in_warp_done.assign((thread_count + 31) / 32, 0);
    for (unsigned i = 0; i < thread_count; i++) {
        Fibre &f = fibres[i];
        f.number = i;
        f.lane = i % 32;
        f.warp = i / 32;
        f.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
    self.block_dim = block;
    self.grid_dim = grid;
    body = &work;
    dynamic_bytes = shared_bytes;
    shared_top = arena_bytes; // so that the first block clears the whole arena
    failed = false;
    reports = 0;
    told.clear();
    first_serial = block_serial + 1;
    random_state = options.seed;
    forget_old_accesses();
    std::vector<unsigned> order = initial_order(thread_count), block_order = initial_order(blocks);
    arrange(block_order);
    for (unsigned b : block_order) {
        self.block = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
        run_block(order);
        if (failed) break;
    }
    body = nullptr;
    ASAN_UNPOISON_MEMORY_REGION(arena, arena_bytes);
    if (!failed && !reports) return cudaSuccess;
    Dl_info info;
    if (dladdr(kernel, &info) && info.dli_sname) {
        char *name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
        report.insert(said, std::string("in ") + (name ? name : info.dli_sname) + ":\n");
        std::free(name);
    }
    fputs(report.c_str() + said, stderr);
    return last_error = cudaErrorLaunchFailure;
}

void *dynamic_shared() { return arena; }

void *shared_array(const void *key, const char *name, size_t bytes) {
    for (const SharedArray &s : shared)
        if (s.key == key) return arena + s.offset;
    shared_used += (bytes + 15) / 16 * 16;
    if (shared_used > options.shared_limit || shared_top + bytes + red_zone > arena_bytes) {
        say("%s: with %s the block has more than %zu bytes of shared memory", who(*current).c_str(), name,
            options.shared_limit);
        fail();
    }
    shared.push_back({key, name, shared_top, bytes});
    ASAN_UNPOISON_MEMORY_REGION(arena + shared_top, bytes);
    void *p = arena + shared_top;
    shared_top = (shared_top + bytes + red_zone + 127) / 128 * 128;
    return p;
}

int block_barrier(bool predicate, const char *file, int line) {
    Fibre &f = *current;
    f.file = file;
    f.line = line;
    if (!at_barrier) {
        first_at_barrier = &f;
    } else if (first_at_barrier->line != line || std::strcmp(first_at_barrier->file, file) != 0) {
        say("divergent barrier: %s is at %s:%d while thread (%u,%u,%u) waits at %s:%d", who(f).c_str(), file, line,
            first_at_barrier->index.x, first_at_barrier->index.y, first_at_barrier->index.z, first_at_barrier->file,
            first_at_barrier->line);
        fail();
    }
    predicate_count += predicate;
    if (++at_barrier == thread_count) {
        for (unsigned i = 0; i < thread_count; i++) fibres[i].state = State::ready;
        last_count = predicate_count;
        at_barrier = predicate_count = 0;
        barrier_epoch++;
        return static_cast<int>(last_count); // the last to arrive runs on
    }
    f.state = State::at_barrier;
    to_scheduler();
    return static_cast<int>(last_count);
}

uint64_t warp_wait(WarpOp op, unsigned mask, uint64_t value, int source, const char *file, int line) {
    Fibre &f = *current;
    Fibre *const warp = &fibres[f.warp * 32];
    const unsigned lanes = std::min(32u, thread_count - f.warp * 32), all = lanes == 32 ? ~0u : (1u << lanes) - 1;
    const char *wrong = nullptr;
    if (!(mask >> f.lane & 1))
        wrong = "the mask leaves out the calling lane";
    else if (mask & ~all)
        wrong = "the mask names lanes that the block does not have";
    else if (mask & in_warp_done[f.warp])
        wrong = "the mask names a lane that has returned";
    else if (op == WarpOp::shuffle && (source < 0 || source > 31 || !(mask >> source & 1)))
        wrong = "the shuffle reads from a lane outside the mask";
    if (wrong) {
        say("%s at %s:%d: %s (mask %08x)", who(f).c_str(), file, line, wrong, mask);
        fail();
    }
    f.op = op;
    f.mask = mask;
    f.value = value;
    f.source = source;
    f.file = file;
    f.line = line;
    unsigned &waiting = in_warp_mask[f.warp];
    waiting |= 1u << f.lane;
    if ((waiting & mask) != mask) {
        f.state = State::in_warp;
        to_scheduler();
        return f.result;
    }
    unsigned ballot = 0;
    for (unsigned l = 0; l < lanes; l++) { // the last lane to arrive answers for all
        if (!(mask >> l & 1)) continue;
        const Fibre &g = warp[l];
        if (g.op != op || g.mask != mask || g.line != line) {
            say("mismatched warp collective: %s at %s:%d (mask %08x) meets thread (%u,%u,%u) at %s:%d (mask %08x)",
                who(f).c_str(), file, line, mask, g.index.x, g.index.y, g.index.z, g.file, g.line, g.mask);
            fail();
        }
        ballot |= static_cast<unsigned>(g.value & 1) << l;
    }
    uint32_t joined[32] = {};
    if (op == WarpOp::sync)
        for (unsigned l = 0; l < lanes; l++)
            if (mask >> l & 1)
                for (unsigned k = 0; k < 32; k++) joined[k] = std::max(joined[k], warp[l].clock[k]);
    for (unsigned l = 0; l < lanes; l++) {
        if (!(mask >> l & 1)) continue;
        Fibre &g = warp[l];
        g.result = op == WarpOp::shuffle ? warp[g.source].value : ballot;
        if (op == WarpOp::sync) { // only __syncwarp orders memory; shuffles and votes do not
            std::memcpy(g.clock, joined, sizeof joined);
            g.clock[l]++;
        }
        g.state = State::ready;
    }
    waiting &= ~mask;
    return f.result;
}

// ---- races. Kernels compiled with -fsanitize=thread call the __tsan functions below, which take the place of
//      ThreadSanitizer's library (do not link it) and know CUDA's rules of ordering ----
namespace {

enum class Kind : uint8_t { none, read, write, atomic };
struct Access {
    uint32_t block = 0, epoch = 0, clock = 0;
    uint16_t thread = 0;
    uint8_t bytes = 0; // of the cell's two
    Kind kind = Kind::none;
    const void *pc = nullptr;
};
struct Cell {
    Access write, atomic, read[2];
}; // of two bytes of memory, the last of each
bool instrumented = false; // were the kernels compiled with -fsanitize=thread?
constexpr uintptr_t shadow_page = 4096;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> shadow;
struct {
    uintptr_t page = ~uintptr_t{0};
    Cell *cells = nullptr;
} cached[64];

Cell &cell_at(uintptr_t address) {
    const uintptr_t page = address / shadow_page;
    auto &c = cached[page % 64];
    if (c.page != page) {
        auto &cells = shadow[page];
        if (!cells) cells = std::make_unique<Cell[]>(shadow_page / 2);
        c.page = page;
        c.cells = cells.get();
    }
    return c.cells[address % shadow_page / 2];
}

bool before_me(const Access &a, bool is_shared) { // is `a` ordered before what the current thread does now?
    if (a.block < first_serial) return true;
    if (a.block != block_serial) return is_shared;
    if (a.thread == current->number || a.epoch < barrier_epoch) return true;
    return a.thread / 32 == current->warp && current->clock[a.thread % 32] >= a.clock;
}

std::string place(const void *pc) {
    Dl_info info;
    char text[300];
    if (!pc || !dladdr(pc, &info)) return "?";
    snprintf(text, sizeof text, "%s+0x%zx", info.dli_fname,
             static_cast<size_t>(static_cast<const char *>(pc) - static_cast<const char *>(info.dli_fbase)) - 1);
    return text;
}

std::string describe(uintptr_t address) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(arena);
    char text[120];
    snprintf(text, sizeof text, "global memory at 0x%zx", static_cast<size_t>(address));
    if (address - base < dynamic_bytes)
        snprintf(text, sizeof text, "dynamic shared memory, byte %zu", static_cast<size_t>(address - base));
    for (const SharedArray &s : shared)
        if (address - base >= s.offset && address - base - s.offset < s.bytes)
            snprintf(text, sizeof text, "shared array %s, byte %zu", s.name,
                     static_cast<size_t>(address - base - s.offset));
    return text;
}

// Each pair of places in the code is told once per launch.
void tell(uintptr_t address, const char *what, const Access &now, const Access *other) {
    static const char *const names[] = {"?", "read", "write", "atomic update"};
    const std::pair<const void *, const void *> places{now.pc, other ? other->pc : nullptr};
    if (!told.insert(places).second || reports++ >= options.max_reports) return;
    say("%s: %s, %s of %s at %s", what, who(*current).c_str(), names[static_cast<int>(now.kind)],
        describe(address).c_str(), place(now.pc).c_str());
    if (other)
        say("  against the %s by thread number %u of %s at %s", names[static_cast<int>(other->kind)], other->thread,
            other->block == block_serial ? "the same block" : "another block", place(other->pc).c_str());
}

void touch(const void *pointer, size_t bytes, Kind kind, const void *pc) {
    if (!current) return; // host code
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address - reinterpret_cast<uintptr_t>(&self) < sizeof self) return;
    const uintptr_t in_stacks = address - reinterpret_cast<uintptr_t>(stacks);
    Access now{block_serial,
               barrier_epoch,
               current->clock[current->lane],
               static_cast<uint16_t>(current->number),
               0,
               kind,
               pc};
    if (in_stacks < stack_slots * stack_slot) {
        if (in_stacks / stack_slot != current->number) tell(address, "another thread's local variable", now, nullptr);
        return;
    }
    const bool is_shared = address - reinterpret_cast<uintptr_t>(arena) < arena_bytes;
    for (const uintptr_t end = address + bytes; address < end; address = (address | 1) + 1) {
        Cell &c = cell_at(address);
        now.bytes = static_cast<uint8_t>(address & 1 ? 2 : end - address == 1 ? 1 : 3);
        const auto races = [&](const Access &a) { return (a.bytes & now.bytes) && !before_me(a, is_shared); };
        const Access *other = nullptr;
        if (races(c.write))
            other = &c.write;
        else if (kind != Kind::atomic && races(c.atomic))
            other = &c.atomic;
        else if (kind != Kind::read && races(c.read[0]))
            other = &c.read[0];
        else if (kind != Kind::read && races(c.read[1]))
            other = &c.read[1];
        if (other)
            tell(address, "race", now, other);
        else if (is_shared && kind != Kind::write && c.write.block != block_serial && c.atomic.block != block_serial)
            tell(address, "uninitialised shared memory", now, nullptr);
        if (kind == Kind::read) {
            if (c.read[0].block != block_serial || c.read[0].thread != now.thread) c.read[1] = c.read[0];
            c.read[0] = now;
        } else {
            (kind == Kind::write ? c.write : c.atomic) = now;
        }
    }
}

} // namespace

// What earlier launches did never matters; its records are dropped when they take more than about 200 MB.
static void forget_old_accesses() {
    if (shadow.size() <= 1024) return;
    shadow.clear();
    for (auto &c : cached) c.page = ~uintptr_t{0};
}

void note_atomic(const void *address, size_t bytes, const void *pc) {
    if (instrumented) touch(address, bytes, Kind::atomic, pc);
}

} // namespace cuda_on_cpu

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    }
    return "unknown error";
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = cuda_on_cpu::last_error;
    cuda_on_cpu::last_error = cudaSuccess;
    return error;
}

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
extern "C" {
#define HOOK(name, n, kind) \
    void __tsan_##name(void *p) { cuda_on_cpu::touch(p, n, cuda_on_cpu::Kind::kind, __builtin_return_address(0)); }
HOOK(read1, 1, read);
HOOK(read2, 2, read);
HOOK(read4, 4, read);
HOOK(read8, 8, read);
HOOK(read16, 16, read);
HOOK(write1, 1, write);
HOOK(write2, 2, write);
HOOK(write4, 4, write);
HOOK(write8, 8, write);
HOOK(write16, 16, write);
HOOK(unaligned_read2, 2, read);
HOOK(unaligned_read4, 4, read);
HOOK(unaligned_read8, 8, read);
HOOK(unaligned_read16, 16, read);
HOOK(unaligned_write2, 2, write);
HOOK(unaligned_write4, 4, write);
HOOK(unaligned_write8, 8, write);
HOOK(unaligned_write16, 16, write);
void __tsan_read_range(void *p, size_t n) {
    cuda_on_cpu::touch(p, n, cuda_on_cpu::Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void *p, size_t n) {
    cuda_on_cpu::touch(p, n, cuda_on_cpu::Kind::write, __builtin_return_address(0));
}
void __tsan_init() { cuda_on_cpu::instrumented = true; }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
}
#endif
