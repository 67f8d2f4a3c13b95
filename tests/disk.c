/* A disk that fails: preloaded before libc, so that every write of a process is seen, whatever library makes it.

   DISK_FOLDER  what lies under it is counted
   DISK_FAIL    from this call on (1 is the first) every one fails; 0 or none only counts
   DISK_ERROR   errno of the failure (28: full, 30: read-only)
   DISK_LOG     a file outside of the folder: one line per counted call
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int calls;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int under(const char *path) {
    const char *folder = getenv("DISK_FOLDER");
    return folder && *folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static const char *absolute(int dir, const char *path, char *buffer) {
    if (!path || path[0] == '/') return path;
    char link[64];
    ssize_t length;
    if (dir == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    length = readlink(link, buffer, PATH_MAX);
    if (length < 0) return path;
    snprintf(buffer + length, PATH_MAX - length, "/%s", path);
    return buffer;
}

/* Whether this call, of a path in the folder, is to fail; sets errno then. */
static int fails(const char *what, const char *path) {
    const char *log = getenv("DISK_LOG"), *from = getenv("DISK_FAIL"), *error = getenv("DISK_ERROR");
    int number = __sync_add_and_fetch(&calls, 1);
    if (log) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%d %s %s\n", number, what, path);
        int fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
        if (fd >= 0) {
            if (REAL(write)(fd, line, size) < 0) abort();
            close(fd);
        }
    }
    if (!from || atoi(from) <= 0 || number < atoi(from)) return 0;
    errno = error ? atoi(error) : ENOSPC;
    return 1;
}

static int path_fails(const char *what, int dir, const char *path) {
    char buffer[2 * PATH_MAX];
    if (!getenv("DISK_FOLDER")) return 0;
    path = absolute(dir, path, buffer);
    return under(path) && fails(what, path);
}

static int fd_fails(const char *what, int fd) {
    char link[64], path[PATH_MAX];
    if (!getenv("DISK_FOLDER")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return under(path) && fails(what, path);
}

#define WRITES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (WRITES(flags) && path_fails("open", AT_FDCWD, path)) return -1; \
        return REAL(name)(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)
#define OPENING_AT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (WRITES(flags) && path_fails("open", dir, path)) return -1; \
        return REAL(name)(dir, path, flags, mode); \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    return fd_fails("write", fd) ? -1 : REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return fd_fails("write", fd) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return fd_fails("write", fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return fd_fails("write", fd) ? -1 : REAL(writev)(fd, parts, count);
}
/* They wait for nothing: see tests/isolation.py. */
int fsync(int fd) { return fd_fails("fsync", fd) ? -1 : 0; }
int fdatasync(int fd) { return fd_fails("fsync", fd) ? -1 : 0; }
int ftruncate(int fd, off_t size) { return fd_fails("truncate", fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fd_fails("truncate", fd) ? -1 : REAL(ftruncate64)(fd, size); }
int mkdir(const char *path, mode_t mode) {
    return path_fails("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int dir, const char *path, mode_t mode) {
    return path_fails("mkdir", dir, path) ? -1 : REAL(mkdirat)(dir, path, mode);
}
int rename(const char *from, const char *to) {
    return path_fails("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return path_fails("rename", to_dir, to) ? -1 : REAL(renameat)(from_dir, from, to_dir, to);
}
/* A full disk still lets go of what is on it. */
static int removing_fails(int dir, const char *path) {
    const char *error = getenv("DISK_ERROR");
    int failed = path_fails("remove", dir, path);
    return failed && !(error && atoi(error) == ENOSPC);
}
int unlink(const char *path) { return removing_fails(AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return removing_fails(AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
int unlinkat(int dir, const char *path, int flags) {
    return removing_fails(dir, path) ? -1 : REAL(unlinkat)(dir, path, flags);
}
int link(const char *from, const char *to) {
    return path_fails("link", AT_FDCWD, to) ? -1 : REAL(link)(from, to);
}
int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    return path_fails("link", to_dir, to) ? -1 : REAL(linkat)(from_dir, from, to_dir, to, flags);
}
