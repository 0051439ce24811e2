/* Faults of a disk, below every library: counts the calls that change files (or read them) below one folder, and at the
 * N-th does what a crash or a bad disk does. Preloaded into the process that forks the commands under test.
 *
 * The environment says what to do; it is read when a process starts, and again by fault_arm():
 *
 *   FAULT_BELOW    the folder; without it nothing is counted
 *   FAULT_CALLS    "write" (default) or "read": which calls count
 *   FAULT_AT       the number of the call that is struck, from 1; 0: none
 *   FAULT_ACT      kill | stop | short | the name of an errno
 *   FAULT_WHEN     before | after the call; an errno "after" is an answer that was lost
 *   FAULT_LASTING  1: the calls behind it fail, too (a full disk stays full)
 *   FAULT_COUNT    a file of 8 bytes: the count, shared by all processes that name it
 *   FAULT_LOG      a file that gets one line a call: number, call, path
 *   FAULT_NO_FLOCK 1: flock says that it worked, and does nothing (as on many network file systems)
 *   FAULT_PAUSE    microseconds, at most, that each counted call waits before it is made (races)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, WRITE, FLUSH, NAME, REMOVE, FOLDER, CUT, CLOSE, READ_OPEN, READ };
enum act { NOTHING, KILL, STOP, SHORT, ERROR };
enum fate { PASS, REFUSED, HALF, LATE };

static char below[PATH_MAX];
static size_t below_length;
static int reading, after, lasting, error, log_fd = -1, no_flock;
static enum act act;
static long at;
static unsigned pause_us, pause_state;
static uint64_t own_count;
static uint64_t *count = &own_count;

static const struct { const char *name; int value; } ERRORS[] = {
    {"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EROFS", EROFS}, {"EDQUOT", EDQUOT}, {"ESTALE", ESTALE}, {"EACCES", EACCES},
    {"ENOENT", ENOENT},
};

static const char *said(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

void fault_arm(void) {
    below_length = 0; /* nothing strikes while this is half done */
    own_count = 0;
    count = &own_count;
    reading = !strcmp(said("FAULT_CALLS"), "read");
    at = atol(said("FAULT_AT"));
    after = !strcmp(said("FAULT_WHEN"), "after");
    lasting = !strcmp(said("FAULT_LASTING"), "1");
    no_flock = !strcmp(said("FAULT_NO_FLOCK"), "1");
    pause_us = (unsigned)atol(said("FAULT_PAUSE"));
    pause_state = (unsigned)getpid() * 2654435761u;
    const char *word = said("FAULT_ACT");
    act = !strcmp(word, "kill") ? KILL : !strcmp(word, "stop") ? STOP : !strcmp(word, "short") ? SHORT : NOTHING;
    error = act == SHORT ? ENOSPC : 0; /* what follows a short write that lasts */
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (!strcmp(word, ERRORS[i].name)) {
            act = ERROR;
            error = ERRORS[i].value;
        }
    if (*said("FAULT_COUNT")) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, said("FAULT_COUNT"), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (fd >= 0) {
            if (syscall(SYS_ftruncate, fd, 8) == 0) {
                void *shared = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
                if (shared != MAP_FAILED)
                    count = shared;
            }
            syscall(SYS_close, fd);
        }
    }
    if (log_fd >= 0)
        syscall(SYS_close, log_fd);
    log_fd = -1;
    if (*said("FAULT_LOG"))
        log_fd = (int)syscall(
            SYS_openat, AT_FDCWD, said("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    strncpy(below, said("FAULT_BELOW"), sizeof below - 1);
    below_length = strlen(below);
}

__attribute__((constructor)) static void begin(void) { fault_arm(); }

/* The path of an open file; "" where it has none. */
static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    buffer[length > 0 ? length : 0] = 0;
    return buffer;
}

/* A path in full. */
static const char *full(int folder, const char *path, char *buffer) {
    if (!path || *path == '/')
        return path ? path : "";
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return "";
    } else {
        path_of(folder, base);
    }
    if (snprintf(buffer, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
        return "";
    return buffer;
}

static int inside(const char *path) {
    return path && !strncmp(path, below, below_length) && (path[below_length] == '/' || !path[below_length]);
}

static void die(void) {
    for (;;) {
        syscall(SYS_kill, getpid(), SIGKILL);
        pause();
    }
}

static int lasts(enum kind kind) { /* whether a fault that lasts is met by such a call */
    if (kind == CLOSE)
        return 0;
    return !((error == ENOSPC || error == EDQUOT) && kind == REMOVE);
}

/* What becomes of a call; errno is set where it is refused. */
static enum fate meet(const char *call, enum kind kind, const char *path, const char *other) {
    if (!below_length || (kind >= READ_OPEN) != reading || !(inside(path) || inside(other)))
        return PASS;
    if (pause_us)
        usleep((unsigned)rand_r(&pause_state) % pause_us);
    long number = (long)__atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    if (log_fd >= 0) {
        char line[2 * PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s%s%s\n", number, call, path, other ? " -> " : "",
                              other ? other : "");
        syscall(SYS_write, log_fd, line, (size_t)length);
    }
    if (!at || number < at || (number > at && !(lasting && lasts(kind))))
        return PASS;
    if (number > at && act != ERROR && act != SHORT)
        return PASS;
    if (after && number == at)
        return LATE;
    switch (act) {
    case KILL:
        die();
        return PASS;
    case STOP:
        raise(SIGSTOP);
        return PASS;
    case SHORT:
        if (number == at)
            return kind == WRITE ? HALF : PASS;
        errno = error;
        return REFUSED;
    case ERROR:
        errno = error;
        return REFUSED;
    default:
        return PASS;
    }
}

/* The answer of a call that was made. */
static long answer(enum fate fate, long result, long refused) {
    if (fate != LATE)
        return result;
    if (act == KILL)
        die();
    if (act == STOP)
        raise(SIGSTOP);
    if (act != ERROR)
        return result;
    errno = error;
    return refused;
}

#define REAL(name)                                                                                                     \
    static __typeof__(name) *real;                                                                                     \
    if (!real)                                                                                                         \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OF_FD(name, kind, arguments, ...)                                                                              \
    int name(__VA_ARGS__) {                                                                                            \
        REAL(name);                                                                                                    \
        char buffer[PATH_MAX];                                                                                         \
        enum fate fate = below_length ? meet(#name, kind, path_of(fd, buffer), NULL) : PASS;                           \
        return fate == REFUSED ? -1 : (int)answer(fate, real arguments, -1);                                           \
    }

#define OF_PATH(name, kind, folder, arguments, ...)                                                                    \
    int name(__VA_ARGS__) {                                                                                            \
        REAL(name);                                                                                                    \
        char buffer[PATH_MAX];                                                                                         \
        enum fate fate = below_length ? meet(#name, kind, full(folder, path, buffer), NULL) : PASS;                    \
        return fate == REFUSED ? -1 : (int)answer(fate, real arguments, -1);                                           \
    }

#define OF_TWO(name, from, to, arguments, ...)                                                                         \
    int name(__VA_ARGS__) {                                                                                            \
        REAL(name);                                                                                                    \
        char one[PATH_MAX], two[PATH_MAX];                                                                             \
        enum fate fate = below_length ? meet(#name, NAME, full(from, old, one), full(to, new, two)) : PASS;            \
        return fate == REFUSED ? -1 : (int)answer(fate, real arguments, -1);                                           \
    }

OF_FD(fsync, FLUSH, (fd), int fd)
OF_FD(fdatasync, FLUSH, (fd), int fd)
OF_FD(ftruncate, CUT, (fd, length), int fd, off_t length)
OF_FD(ftruncate64, CUT, (fd, length), int fd, off64_t length)
OF_PATH(truncate, CUT, AT_FDCWD, (path, length), const char *path, off_t length)
OF_PATH(truncate64, CUT, AT_FDCWD, (path, length), const char *path, off64_t length)
OF_PATH(unlink, REMOVE, AT_FDCWD, (path), const char *path)
OF_PATH(unlinkat, REMOVE, folder, (folder, path, flags), int folder, const char *path, int flags)
OF_PATH(remove, REMOVE, AT_FDCWD, (path), const char *path)
OF_PATH(rmdir, REMOVE, AT_FDCWD, (path), const char *path)
OF_PATH(mkdir, FOLDER, AT_FDCWD, (path, mode), const char *path, mode_t mode)
OF_PATH(mkdirat, FOLDER, folder, (folder, path, mode), int folder, const char *path, mode_t mode)
OF_TWO(rename, AT_FDCWD, AT_FDCWD, (old, new), const char *old, const char *new)
OF_TWO(renameat, from, to, (from, old, to, new), int from, const char *old, int to, const char *new)
OF_TWO(renameat2, from, to, (from, old, to, new, flags), int from, const char *old, int to, const char *new,
       unsigned flags)
OF_TWO(link, AT_FDCWD, AT_FDCWD, (old, new), const char *old, const char *new)
OF_TWO(linkat, from, to, (from, old, to, new, flags), int from, const char *old, int to, const char *new, int flags)
OF_TWO(symlink, AT_FDCWD, AT_FDCWD, (old, new), const char *old, const char *new)

static int for_writing(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
}

int close(int fd) {
    REAL(close);
    char buffer[PATH_MAX];
    enum fate fate = below_length && for_writing(fd) ? meet("close", CLOSE, path_of(fd, buffer), NULL) : PASS;
    if (fate == REFUSED) { /* the file is closed all the same */
        int reason = errno;
        real(fd);
        errno = reason;
        return -1;
    }
    return (int)answer(fate, real(fd), -1);
}

#define WRITES(name, kind, arguments, halved, ...)                                                                     \
    ssize_t name(__VA_ARGS__) {                                                                                        \
        REAL(name);                                                                                                    \
        char buffer[PATH_MAX];                                                                                         \
        enum fate fate = below_length ? meet(#name, kind, path_of(fd, buffer), NULL) : PASS;                           \
        if (fate == REFUSED)                                                                                           \
            return -1;                                                                                                 \
        if (fate == HALF)                                                                                              \
            halved;                                                                                                    \
        return answer(fate, real arguments, -1);                                                                       \
    }

WRITES(write, WRITE, (fd, data, size), size = size > 1 ? size / 2 : size, int fd, const void *data, size_t size)
WRITES(pwrite, WRITE, (fd, data, size, place), size = size > 1 ? size / 2 : size, int fd, const void *data, size_t size,
       off_t place)
WRITES(pwrite64, WRITE, (fd, data, size, place), size = size > 1 ? size / 2 : size, int fd, const void *data,
       size_t size, off64_t place)
WRITES(writev, WRITE, (fd, pieces, number), number = number > 1 ? number / 2 : number, int fd,
       const struct iovec *pieces, int number)
WRITES(sendfile, WRITE, (fd, from, place, size), size = size > 1 ? size / 2 : size, int fd, int from, off_t *place,
       size_t size)
WRITES(sendfile64, WRITE, (fd, from, place, size), size = size > 1 ? size / 2 : size, int fd, int from, off64_t *place,
       size_t size)
WRITES(read, READ, (fd, data, size), (void)0, int fd, void *data, size_t size)
WRITES(pread, READ, (fd, data, size, place), (void)0, int fd, void *data, size_t size, off_t place)
WRITES(pread64, READ, (fd, data, size, place), (void)0, int fd, void *data, size_t size, off64_t place)
WRITES(readv, READ, (fd, pieces, number), (void)0, int fd, const struct iovec *pieces, int number)

ssize_t copy_file_range(int from, off64_t *from_place, int fd, off64_t *place, size_t size, unsigned flags) {
    REAL(copy_file_range);
    char buffer[PATH_MAX];
    enum fate fate = below_length ? meet("copy_file_range", WRITE, path_of(fd, buffer), NULL) : PASS;
    if (fate == REFUSED)
        return -1;
    if (fate == HALF && size > 1)
        size /= 2;
    return answer(fate, real(from, from_place, fd, place, size, flags), -1);
}

int posix_fallocate(int fd, off_t place, off_t length) { /* gives the errno */
    REAL(posix_fallocate);
    char buffer[PATH_MAX];
    enum fate fate = below_length ? meet("posix_fallocate", CUT, path_of(fd, buffer), NULL) : PASS;
    return fate == REFUSED ? errno : (int)answer(fate, real(fd, place, length), error);
}

#define OPENS(name, folder, arguments, ...)                                                                            \
    int name(__VA_ARGS__, ...) {                                                                                       \
        REAL(name);                                                                                                    \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                                         \
            va_list rest;                                                                                              \
            va_start(rest, flags);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                               \
            va_end(rest);                                                                                              \
        }                                                                                                              \
        char buffer[PATH_MAX];                                                                                         \
        enum kind kind = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC) ? OPEN : READ_OPEN;            \
        enum fate fate = below_length ? meet(#name, kind, full(folder, path, buffer), NULL) : PASS;                    \
        return fate == REFUSED ? -1 : (int)answer(fate, real arguments, -1);                                           \
    }

OPENS(open, AT_FDCWD, (path, flags, mode), const char *path, int flags)
OPENS(open64, AT_FDCWD, (path, flags, mode), const char *path, int flags)
OPENS(openat, folder, (folder, path, flags, mode), int folder, const char *path, int flags)
OPENS(openat64, folder, (folder, path, flags, mode), int folder, const char *path, int flags)

/* Streams of the C library call the system past the functions above. */

#define STREAMS(name)                                                                                                  \
    FILE *name(const char *path, const char *mode) {                                                                   \
        REAL(name);                                                                                                    \
        char buffer[PATH_MAX];                                                                                         \
        enum kind kind = strpbrk(mode, "wa+") ? OPEN : READ_OPEN;                                                      \
        enum fate fate = below_length ? meet(#name, kind, full(AT_FDCWD, path, buffer), NULL) : PASS;                  \
        if (fate == REFUSED)                                                                                           \
            return NULL;                                                                                               \
        FILE *file = real(path, mode);                                                                                 \
        return file && answer(fate, 0, -1) ? NULL : file;                                                              \
    }

STREAMS(fopen)
STREAMS(fopen64)

size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
    REAL(fwrite);
    char buffer[PATH_MAX];
    enum fate fate = below_length ? meet("fwrite", WRITE, path_of(fileno(file), buffer), NULL) : PASS;
    if (fate == REFUSED)
        return 0;
    if (fate == HALF && number > 1)
        number /= 2;
    return (size_t)answer(fate, (long)real(data, size, number, file), 0);
}

size_t fread(void *data, size_t size, size_t number, FILE *file) {
    REAL(fread);
    char buffer[PATH_MAX];
    enum fate fate = below_length ? meet("fread", READ, path_of(fileno(file), buffer), NULL) : PASS;
    return fate == REFUSED ? 0 : (size_t)answer(fate, (long)real(data, size, number, file), 0);
}

int fclose(FILE *file) {
    REAL(fclose);
    char buffer[PATH_MAX];
    int fd = fileno(file);
    enum fate fate = below_length && for_writing(fd) ? meet("fclose", CLOSE, path_of(fd, buffer), NULL) : PASS;
    if (fate == REFUSED) {
        int reason = errno;
        real(file);
        errno = reason;
        return EOF;
    }
    return (int)answer(fate, real(file), EOF);
}

int flock(int fd, int operation) {
    REAL(flock);
    return no_flock ? 0 : real(fd, operation);
}
