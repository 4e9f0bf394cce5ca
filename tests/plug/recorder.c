/* Loaded into a program (LD_PRELOAD), this writes down what the program does to the
 * files in one directory and what it sends to sockets, in one order.
 *
 * PLUG_LOG   the file that the records are appended to
 * PLUG_DIR   the directory, its path without links
 * PLUG_FAIL  kinds:n:errno:count; of the calls of these kinds (letters as below) the
 *            n-th fails, and so do those after it, count in all
 *
 * A call has one record before it, with its data, and one after it, with its result.
 * A store through a mapping is seen where the kernel is asked for it (preadv(2) into
 * the mapping). Flushes are recorded and not carried out: nobody pulls a real plug.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
    WRITE = 'W', TRUNCATE = 'T', ALLOCATE = 'A', FLUSH = 'F',
    SEND = 'X', RENAME = 'N', END = 'E',
};
enum { DSYNC = 1, MAPPED = 2 };
enum { NB_MAPPINGS = 256, MAX_COPY = 1 << 20, LOG_FD = 900 };

struct record {
    uint32_t kind, flags;
    uint64_t number, file, offset, length;
    int64_t result;
    uint64_t nb_data;
};

static int log_fd = -1;
static char directory[PATH_MAX];
static char fail_kinds[16];
static long fail_at, fail_errno, fail_count;
static _Atomic uint64_t nb_calls, nb_failing;
static _Atomic unsigned nb_mappings;
static struct { uintptr_t start, end; uint64_t offset, file; } mappings[NB_MAPPINGS];

/* Lets `next` be the function of this name that the program would have called. */
#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("PLUG_LOG"), *below = getenv("PLUG_DIR");
    const char *fail = getenv("PLUG_FAIL");
    if (!path || !below) return;
    snprintf(directory, sizeof directory, "%s", below);
    if (fail)
        sscanf(fail, "%15[A-Z]:%ld:%ld:%ld", fail_kinds, &fail_at, &fail_errno, &fail_count);
    int fd = syscall(SYS_open, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, LOG_FD);
    close(fd);
}

static void put(struct record *record, const struct iovec *iov, int count)
{
    struct iovec all[1 + IOV_MAX] = {{record, sizeof *record}};
    int saved = errno;
    for (int i = 0; i < count; i++) record->nb_data += iov[i].iov_len;
    if (count) memcpy(all + 1, iov, count * sizeof *iov);
    if (syscall(SYS_writev, log_fd, all, 1 + count) < 0) abort();
    errno = saved;
}

/* The inode of what is open as fd, if it is in the directory or is it; else 0. */
static uint64_t file_of(int fd)
{
    char name[32], path[PATH_MAX];
    struct stat status;
    uint64_t file = 0;
    int saved = errno;
    if (log_fd < 0) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1), own = strlen(directory);
    if (length >= own && !strncmp(path, directory, own) && (length == own || path[own] == '/')
        && !fstat(fd, &status) && (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode)))
        file = status.st_ino;
    errno = saved;
    return file;
}

/* Writes down that a call begins. Returns its number, 0 if it has to fail. */
static uint64_t begin(enum kind kind, unsigned flags, uint64_t file, uint64_t offset,
                      uint64_t length, const struct iovec *iov, int count)
{
    struct record record = {kind, flags, ++nb_calls, file, offset, length, 0, 0};
    put(&record, iov, count);
    if (fail_at && strchr(fail_kinds, kind)) {
        long n = ++nb_failing;
        if (n >= fail_at && n < fail_at + fail_count) {
            struct record end = {END, 0, record.number, file, 0, 0, -fail_errno, 0};
            put(&end, NULL, 0);
            errno = fail_errno;
            return 0;
        }
    }
    return record.number;
}

static int64_t end(uint64_t number, uint64_t file, int64_t result)
{
    struct record record = {END, 0, number, file, 0, 0, result < 0 ? -errno : result, 0};
    put(&record, NULL, 0);
    return result;
}

/* The body of a call: `real`, recorded if it is to one of the files. */
#define RECORDED(kind, flags, offset, length, iov, count, real) \
    uint64_t file = file_of(fd); \
    if (!file) return real; \
    uint64_t number = begin(kind, flags, file, offset, length, iov, count); \
    return number ? end(number, file, real) : -1

static void sends(int fd, const struct iovec *iov, int count)
{
    struct stat status;
    int saved = errno;
    if (log_fd >= 0 && !fstat(fd, &status) && S_ISSOCK(status.st_mode)) {
        struct record record = {SEND, 0, ++nb_calls, fd, 0, 0, 0, 0};
        put(&record, iov, count);
    }
    errno = saved;
}

/* -- writes ------------------------------------------------------------------ */

ssize_t pwritev64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags)
{
    NEXT(pwritev64v2);
    unsigned durable = flags & (RWF_DSYNC | RWF_SYNC) ? DSYNC : 0;
    RECORDED(WRITE, durable, offset, 0, iov, count, next(fd, iov, count, offset, flags));
}

ssize_t pwritev64(int fd, const struct iovec *iov, int count, off64_t offset)
{
    return pwritev64v2(fd, iov, count, offset, 0);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
    NEXT(pwrite64);
    struct iovec iov = {(void *)data, length};
    RECORDED(WRITE, 0, offset, 0, &iov, 1, next(fd, data, length, offset));
}

ssize_t write(int fd, const void *data, size_t length)
{
    NEXT(write);
    struct iovec iov = {(void *)data, length};
    sends(fd, &iov, 1);
    RECORDED(WRITE, 0, lseek64(fd, 0, SEEK_CUR), 0, &iov, 1, next(fd, data, length));
}

ssize_t writev(int fd, const struct iovec *iov, int count)
{
    NEXT(writev);
    sends(fd, iov, count);
    RECORDED(WRITE, 0, lseek64(fd, 0, SEEK_CUR), 0, iov, count, next(fd, iov, count));
}

/* Both offsets are given, as those who call it here do. */
ssize_t copy_file_range(int from, off64_t *source, int fd, off64_t *offset, size_t length,
                        unsigned flags)
{
    NEXT(copy_file_range);
    static _Thread_local char data[MAX_COPY];
    if (length > sizeof data) length = sizeof data;
    struct iovec iov = {data, 0};
    if (file_of(fd)) {
        ssize_t nb_read = pread64(from, data, length, *source);
        iov.iov_len = nb_read < 0 ? 0 : nb_read;
    }
    RECORDED(WRITE, 0, *offset, 0, &iov, 1, next(from, source, fd, offset, length, flags));
}

/* -- stores through a mapping --------------------------------------------------- */

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    NEXT(mmap64);
    void *found = next(address, length, protection, flags, fd, offset);
    if (found == MAP_FAILED || !(flags & MAP_SHARED) || !(protection & PROT_WRITE) || fd < 0)
        return found;
    uint64_t file = file_of(fd);
    if (file) {
        unsigned i = nb_mappings++ % NB_MAPPINGS;
        mappings[i].offset = offset;
        mappings[i].file = file;
        mappings[i].start = (uintptr_t)found;
        mappings[i].end = (uintptr_t)found + length;
    }
    return found;
}

int munmap(void *address, size_t length)
{
    NEXT(munmap);
    for (int i = 0; i < NB_MAPPINGS; i++)
        if (mappings[i].start == (uintptr_t)address) mappings[i].start = mappings[i].end = 0;
    return next(address, length);
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags)
{
    NEXT(preadv64v2);
    uintptr_t to = count == 1 ? (uintptr_t)iov->iov_base : 0;
    for (int i = 0; to && i < NB_MAPPINGS; i++) {
        if (to < mappings[i].start || to >= mappings[i].end) continue;
        uint64_t file = mappings[i].file;
        uint64_t place = mappings[i].offset + to - mappings[i].start;
        char *data = malloc(iov->iov_len);
        struct iovec store = {data, pread64(fd, data, iov->iov_len, offset)};
        uint64_t number = begin(WRITE, MAPPED, file, place, 0, &store, 1);
        free(data);
        return number ? end(number, file, next(fd, iov, count, offset, flags)) : -1;
    }
    return next(fd, iov, count, offset, flags);
}

/* -- lengths and holes ------------------------------------------------------------ */

int ftruncate64(int fd, off64_t length)
{
    NEXT(ftruncate64);
    RECORDED(TRUNCATE, 0, 0, length, NULL, 0, next(fd, length));
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    NEXT(fallocate64);
    RECORDED(ALLOCATE, mode, offset, length, NULL, 0, next(fd, mode, offset, length));
}

int posix_fallocate64(int fd, off64_t offset, off64_t length)
{
    return fallocate64(fd, 0, offset, length) ? errno : 0;
}

static int opened(int fd, int flags)
{
    uint64_t file = fd >= 0 && flags & O_TRUNC ? file_of(fd) : 0;
    uint64_t number = file ? begin(TRUNCATE, 0, file, 0, 0, NULL, 0) : 0;
    if (number) end(number, file, 0);
    return fd;
}

int open64(const char *path, int flags, ...)
{
    NEXT(open64);
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    return opened(next(path, flags, mode), flags);
}

/* -- flushes ------------------------------------------------------------------------ */

static int flush(int fd)
{
    RECORDED(FLUSH, 0, 0, 0, NULL, 0, 0);
}

int fdatasync(int fd) { return flush(fd); }

int fsync(int fd) { return flush(fd); }

/* -- names ---------------------------------------------------------------------------- */

int rename(const char *from, const char *to)
{
    NEXT(rename);
    struct iovec iov[] = {{(void *)from, strlen(from) + 1}, {(void *)to, strlen(to) + 1}};
    struct record record = {RENAME, 0, ++nb_calls, 0, 0, 0, 0, 0};
    if (log_fd >= 0) put(&record, iov, 2);
    return next(from, to);
}

/* -- what clients hear ------------------------------------------------------------------ */

ssize_t send(int fd, const void *data, size_t length, int flags)
{
    NEXT(send);
    struct iovec iov = {(void *)data, length};
    sends(fd, &iov, 1);
    return next(fd, data, length, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    NEXT(sendmsg);
    sends(fd, message->msg_iov, message->msg_iovlen);
    return next(fd, message, flags);
}
