/* Preloaded into a process under test: records what it asks of the disk, in order, in one file.
 *
 * Every change to a file below $RECORDER_ROOT is appended to $RECORDER_LOG as
 *   u8 operation, u32 length of path, i64 offset, u32 length of bytes, path, bytes
 * with the operations C create, D make a directory, W write, T truncate (to offset), S sync, U unlink.
 * A write is recorded before it is made, a sync after. Locks and shared memory of SQLite are left out: no
 * power loss keeps them. $RECORDER_KILL=n kills the process when it is about to sync a WAL for the nth time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;
static int wal_syncs;

static int ends_with(const char *path, const char *end) {
    size_t length = strlen(path), tail = strlen(end);
    return length >= tail && strcmp(path + length - tail, end) == 0;
}

static int watched(const char *path) {
    const char *root = getenv("RECORDER_ROOT");
    return root && strncmp(path, root, strlen(root)) == 0 && !ends_with(path, "-shm") && !ends_with(path, "/lock");
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    path[length > 0 ? length : 0] = 0;
    return length > 0 && watched(path);
}

static void record(char operation, const char *path, int64_t offset, const struct iovec *parts, int count) {
    uint32_t path_length = strlen(path), length = 0;
    for (int i = 0; i < count; i++) length += parts[i].iov_len;
    char head[17];
    head[0] = operation;
    memcpy(head + 1, &path_length, 4);
    memcpy(head + 5, &offset, 8);
    memcpy(head + 13, &length, 4);
    pthread_mutex_lock(&mutex);
    if (log_fd < 0)
        log_fd = REAL(open)(getenv("RECORDER_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    ssize_t (*out)(int, const void *, size_t) = REAL(write);
    int failed = out(log_fd, head, 17) != 17 || out(log_fd, path, path_length) != (ssize_t)path_length;
    for (int i = 0; i < count; i++)
        failed |= out(log_fd, parts[i].iov_base, parts[i].iov_len) != (ssize_t)parts[i].iov_len;
    pthread_mutex_unlock(&mutex);
    if (failed) abort();
}

static void record_write(int fd, int64_t offset, const struct iovec *parts, int count) {
    char path[4096];
    if (path_of(fd, path)) record('W', path, offset, parts, count);
}

ssize_t write(int fd, const void *bytes, size_t size) {
    char path[4096];
    if (fd > 2 && path_of(fd, path)) {
        struct iovec part = {(void *)bytes, size};
        record('W', path, lseek(fd, 0, SEEK_CUR), &part, 1);
    }
    return REAL(write)(fd, bytes, size);
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) {
    struct iovec part = {(void *)bytes, size};
    record_write(fd, offset, &part, 1);
    return REAL(pwrite)(fd, bytes, size, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t offset) {
    struct iovec part = {(void *)bytes, size};
    record_write(fd, offset, &part, 1);
    return REAL(pwrite64)(fd, bytes, size, offset);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    record_write(fd, offset, parts, count);
    return REAL(pwritev)(fd, parts, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    record_write(fd, offset, parts, count);
    return REAL(pwritev64)(fd, parts, count, offset);
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    record_write(fd, offset, parts, count);
    return REAL(pwritev2)(fd, parts, count, offset, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    record_write(fd, offset, parts, count);
    return REAL(pwritev64v2)(fd, parts, count, offset, flags);
}

static void record_truncate(int fd, int64_t size) {
    char path[4096];
    if (path_of(fd, path)) record('T', path, size, NULL, 0);
}

int ftruncate(int fd, off_t size) { record_truncate(fd, size); return REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { record_truncate(fd, size); return REAL(ftruncate64)(fd, size); }

int truncate(const char *path, off_t size) {
    if (watched(path)) record('T', path, size, NULL, 0);
    return REAL(truncate)(path, size);
}

int truncate64(const char *path, off64_t size) {
    if (watched(path)) record('T', path, size, NULL, 0);
    return REAL(truncate64)(path, size);
}

static void about_to_sync(int fd) {
    char path[4096];
    const char *kill_at = getenv("RECORDER_KILL");
    if (kill_at && path_of(fd, path) && ends_with(path, "-wal") && ++wal_syncs == atoi(kill_at)) raise(SIGKILL);
}

static int synced(int fd, int result) {
    char path[4096];
    if (result == 0 && path_of(fd, path)) record('S', path, 0, NULL, 0);
    return result;
}

int fsync(int fd) { about_to_sync(fd); return synced(fd, REAL(fsync)(fd)); }
int fdatasync(int fd) { about_to_sync(fd); return synced(fd, REAL(fdatasync)(fd)); }

int unlink(const char *path) {
    int result = REAL(unlink)(path);
    if (result == 0 && watched(path)) record('U', path, 0, NULL, 0);
    return result;
}

int mkdir(const char *path, mode_t mode) {
    int result = REAL(mkdir)(path, mode);
    if (result == 0 && watched(path)) record('D', path, 0, NULL, 0);
    return result;
}

static void about_to_open(const char *path, int flags) {
    if (!(flags & (O_CREAT | O_TRUNC)) || !watched(path)) return;
    if (access(path, F_OK) != 0) {
        if (flags & O_CREAT) record('C', path, 0, NULL, 0);
    } else if (flags & O_TRUNC) {
        record('T', path, 0, NULL, 0);
    }
}

static mode_t mode_of(int flags, va_list arguments) { return flags & O_CREAT ? va_arg(arguments, mode_t) : 0; }

#define OPEN(name)                                  \
    int name(const char *path, int flags, ...) {    \
        va_list arguments;                          \
        va_start(arguments, flags);                 \
        mode_t mode = mode_of(flags, arguments);    \
        va_end(arguments);                          \
        about_to_open(path, flags);                 \
        return REAL(name)(path, flags, mode);       \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                        \
    int name(int folder, const char *path, int flags, ...) { \
        va_list arguments;                                  \
        va_start(arguments, flags);                         \
        mode_t mode = mode_of(flags, arguments);            \
        va_end(arguments);                                  \
        about_to_open(path, flags);                         \
        return REAL(name)(folder, path, flags, mode);       \
    }
OPENAT(openat)
OPENAT(openat64)
