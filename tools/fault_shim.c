/* Faults of the file system at one chosen instant: loaded before the C library (LD_PRELOAD) by fault_server.py.

   Calls that change something below `root` are counted. At number `at` the process is killed or stopped, or the
   call fails with `how`, an errno, as do the later ones where `lasting`; and from number `clock_at` on the clock
   is `shift` seconds off. Nothing happens before fault_arm. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char root[4096];
static long at, clock_at, count;
static int how, lasting, armed;
static double shift;

void fault_arm(const char *folder, long number, int what, int stays, long clock_number, double seconds) {
    snprintf(root, sizeof root, "%s", folder);
    at = number; how = what; lasting = stays; clock_at = clock_number; shift = seconds; count = 0; armed = 1;
}

long fault_count(void) { return count; }

static int below(const char *path) {
    size_t size = strlen(root);
    return strncmp(path, root, size) == 0 && (path[size] == '/' || path[size] == 0);
}

/* Whether a call that changes something is to fail; it may not come back from a SIGKILL. */
static int fails(const char *path) {
    char whole[8192];
    if (!armed || !path) return 0;
    if (path[0] != '/') {
        char here[4096];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(whole, sizeof whole, "%s/%s", here, path);
        path = whole;
    }
    if (!below(path)) return 0;
    long number = __sync_add_and_fetch(&count, 1);
    if (!at || number < at || (number > at && !(lasting && how > 0))) return 0;
    if (how < 0) { kill(getpid(), -how); return 0; }
    errno = how;
    return how > 0;
}

static int fd_fails(int fd) {
    char link[64], path[4096];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(path);
}

static int at_fails(int fd, const char *path) {
    char link[64], whole[8192];
    if (!armed || !path) return 0;
    if (fd == AT_FDCWD || path[0] == '/') return fails(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, whole, 4000);
    if (size < 0) return 0;
    snprintf(whole + size, sizeof whole - size, "/%s", path);
    return fails(whole);
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    NEXT(name); return CHANGES(flags) && fails(path) ? -1 : next(path, flags, mode); }
#define OPENAT(name) int name(int fd, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    NEXT(name); return CHANGES(flags) && at_fails(fd, path) ? -1 : next(fd, path, flags, mode); }
#define PATH(name, parameters, words) int name parameters { NEXT(name); return fails(path) ? -1 : next words; }
#define AT(name, parameters, words) int name parameters { NEXT(name); return at_fails(fd, path) ? -1 : next words; }
#define FD(type, name, parameters, words) type name parameters { NEXT(name); return fd_fails(fd) ? -1 : next words; }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PATH(rename, (const char *old, const char *path), (old, path))
AT(renameat, (int first, const char *old, int fd, const char *path), (first, old, fd, path))
PATH(mkdir, (const char *path, mode_t mode), (path, mode))
AT(mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode))
PATH(unlink, (const char *path), (path))
AT(unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
PATH(rmdir, (const char *path), (path))
PATH(link, (const char *old, const char *path), (old, path))
PATH(symlink, (const char *to, const char *path), (to, path))
FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place))
FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place))
FD(ssize_t, writev, (int fd, const struct iovec *parts, int number), (fd, parts, number))
FD(int, fsync, (int fd), (fd))
FD(int, fdatasync, (int fd), (fd))
FD(int, ftruncate, (int fd, off_t size), (fd, size))
FD(int, ftruncate64, (int fd, off64_t size), (fd, size))

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    int status = next(clock, now);
    if (status == 0 && clock == CLOCK_REALTIME && armed && clock_at && count >= clock_at) now->tv_sec += (time_t)shift;
    return status;
}
