/*
 * streams.c: stdio on a socket.
 *
 * The C library's streams call its own read and write, which nobody can take over.  A stream that fdopen
 * makes of a VMMC socket therefore gets functions of its own; dprintf formats and then writes.  stdin, stdout and
 * stderr are variables in this C library: while one's number is a VMMC socket (dup2), it names such a stream.  What
 * keeps the old stream's address, as std::cout does, does not follow.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <stdio_ext.h>
#include <string.h>
#include <unistd.h>
#include <wchar.h>

#include "descriptors.h"
#include "real.h"

static ssize_t stream_read(void *cookie, char *buffer, size_t length) {
  return read((int)(intptr_t)cookie, buffer, length);
}
static ssize_t stream_write(void *cookie, const char *buffer, size_t length) {
  size_t done = 0;
  while (done < length) { /* a short count is an error to stdio */
    ssize_t put = write((int)(intptr_t)cookie, buffer + done, length - done);
    if (put < 0) return done ? (ssize_t)done : 0;
    done += (size_t)put;
  }
  return (ssize_t)done;
}
static int stream_seek(void *cookie, off64_t *offset, int from) {
  off64_t at = lseek64((int)(intptr_t)cookie, *offset, from); /* of a socket: ESPIPE.  It may be a file by now: freopen */
  if (at < 0) return -1;
  *offset = at;
  return 0;
}
static int stream_close(void *cookie) { return close((int)(intptr_t)cookie); }

/* What tells streams with functions of their own from others: the C library keeps it behind the stream.  The same for
 * all of them; NULL: none was made yet. */
static const void *_Atomic cookie_functions;
static const void *functions_of(const FILE *stream) {
  const void *functions;
  memcpy(&functions, stream + 1, sizeof functions);
  return functions;
}
static bool has_own_functions(const FILE *stream) {
  return stream->_fileno >= 0 && cookie_functions && functions_of(stream) == cookie_functions;
}

static FILE *stream_of(int fd, const char *mode, cookie_io_functions_t functions) {
  FILE *stream = fopencookie((void *)(intptr_t)fd, mode, functions);
  if (!stream) return NULL;
  stream->_fileno = fd; /* what fileno() answers: the C library keeps it there for all streams */
  cookie_functions = functions_of(stream);
  return stream;
}

INTERPOSE FILE *fdopen(int fd, const char *mode) {
  struct file *f = socket_get(fd);
  if (!f) return REAL(fdopen)(fd, mode);
  file_put(f);
  if (f == &file_forked) {
    descriptor_refuse(fd);
    return NULL;
  }
  return stream_of(fd, mode, (cookie_io_functions_t){stream_read, stream_write, stream_seek, stream_close});
}

enum { NO_READS = 4, NO_WRITES = 8 }; /* in FILE._flags */

/* How open(2) and the stream have to be for a mode of fopen's; false: it is none. */
static bool mode_of(const char *mode, int *flags, int *not_allowed) {
  bool both = strchr(mode, '+');
  *flags = (both ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY) | (strchr(mode, 'e') ? O_CLOEXEC : 0) |
           (strchr(mode, 'x') ? O_EXCL : 0) | (*mode == 'w' ? O_CREAT | O_TRUNC : *mode == 'a' ? O_CREAT | O_APPEND : 0);
  *not_allowed = both ? 0 : *mode == 'r' ? NO_WRITES : NO_READS;
  return *mode == 'r' || *mode == 'w' || *mode == 'a';
}

/* The C library's makes a stream of its own kind of any, and crashes where that had functions of its own.  Ours goes
 * on by its number, which leads to the file then. */
INTERPOSE FILE *freopen64(const char *path, const char *mode, FILE *stream) {
  int flags, not_allowed, fd = stream->_fileno, opened = -1;
  if (!has_own_functions(stream)) return REAL(freopen64)(path, mode, stream);
  fflush(stream);
  __fpurge(stream); /* what was read and not used, and what could not be written */
  if (!mode_of(mode, &flags, &not_allowed)) errno = EINVAL;
  else if (!path) errno = ENXIO; /* a socket cannot be opened once more */
  else opened = open64(path, flags, 0666);
  if (opened < 0 || (opened != fd && dup3(opened, fd, flags & O_CLOEXEC) < 0)) {
    int error = errno;
    if (opened >= 0) close(opened);
    fclose(stream);
    errno = error;
    return NULL;
  }
  if (opened != fd) close(opened);
  clearerr(stream);
  stream->_flags = (stream->_flags & ~(NO_READS | NO_WRITES)) | not_allowed;
  return stream;
}
INTERPOSE FILE *freopen(const char *path, const char *mode, FILE *stream) {
  return has_own_functions(stream) ? freopen64(path, mode, stream) : REAL(freopen)(path, mode, stream);
}

/* ---- the standard streams ---- */

static FILE **const variables[STANDARD_STREAMS] = {&stdin, &stdout, &stderr};
static struct {
  FILE *before; /* what the variable named */
  FILE *ours;   /* what it names while the number is a socket; kept for the next time, as others may know it */
} standard[STANDARD_STREAMS];
static pthread_mutex_t standard_lock = PTHREAD_MUTEX_INITIALIZER;

/* What stands in the buffer of a stream goes on to where its number leads now. */
static void hand_over(FILE *from, FILE *to) {
  flockfile(from);
  size_t pending = __fwriting(from) && fwide(from, 0) <= 0 ? __fpending(from) : 0;
  if (pending) {
    fwrite(from->_IO_write_base, 1, pending, to);
    __fpurge(from);
  }
  funlockfile(from);
}

/* What stdin had read before comes first. */
static ssize_t standard_read(void *cookie, char *buffer, size_t length) {
  FILE *before = standard[(intptr_t)cookie].before;
  size_t left = (size_t)(before->_IO_read_end - before->_IO_read_ptr);
  if (!left) return stream_read(cookie, buffer, length);
  if (length > left) length = left;
  memcpy(buffer, before->_IO_read_ptr, length);
  before->_IO_read_ptr += length;
  return (ssize_t)length;
}

/* fclose: the stream is no more, and the number's next socket gets another. */
static int standard_close(void *cookie) {
  int fd = (int)(intptr_t)cookie;
  critical_lock(&standard_lock);
  *variables[fd] = standard[fd].before;
  standard[fd].ours = NULL;
  critical_unlock(&standard_lock);
  return close(fd);
}

static void to_socket(int fd) {
  FILE *before = *variables[fd];
  if (!before || before == standard[fd].ours || before->_fileno != fd) return; /* the program has put its own there */
  if (!standard[fd].ours) {
    FILE *stream = stream_of(fd, fd ? "w" : "r", (cookie_io_functions_t){standard_read, stream_write, stream_seek, standard_close});
    if (!stream) return;
    standard[fd].ours = stream;
    enum { UNBUFFERED = 2 }; /* _IO_UNBUFFERED: the headers only tell of lines */
    if (before->_flags & UNBUFFERED) setvbuf(stream, NULL, _IONBF, 0);
    else if (__flbf(before)) setvbuf(stream, NULL, _IOLBF, 0);
  }
  standard[fd].before = before;
  hand_over(before, standard[fd].ours);
  *variables[fd] = standard[fd].ours;
}

static void from_socket(int fd) {
  FILE *ours = standard[fd].ours;
  if (!ours || *variables[fd] != ours) return;
  hand_over(ours, standard[fd].before);
  *variables[fd] = standard[fd].before;
}

void streams_follow(int fd) {
  int error = errno;
  critical_lock(&standard_lock);
  const struct file *f = descriptor_peek(fd);
  if (f && f->kind == FILE_SOCKET) to_socket(fd);
  else from_socket(fd);
  critical_unlock(&standard_lock);
  errno = error;
}

void streams_fork_child(void) { standard_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER; }

/* ---- dprintf ---- */

INTERPOSE int vdprintf(int fd, const char *format, va_list arguments) {
  struct file *f = socket_get(fd);
  if (!f) return REAL(vdprintf)(fd, format, arguments);
  file_put(f);
  if (f == &file_forked) return descriptor_refuse(fd);
  char *text = NULL;
  int length = vasprintf(&text, format, arguments);
  if (length < 0) return -1;
  ssize_t put = stream_write((void *)(intptr_t)fd, text, (size_t)length);
  int error = errno;
  free(text);
  errno = error;
  return put == length ? length : -1;
}

INTERPOSE int dprintf(int fd, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int result = vdprintf(fd, format, arguments);
  va_end(arguments);
  return result;
}
int __vdprintf_chk(int fd, int flag, const char *format, va_list arguments);
int __dprintf_chk(int fd, int flag, const char *format, ...);
INTERPOSE int __vdprintf_chk(int fd, int flag, const char *format, va_list arguments) {
  (void)flag; /* the check is for %n in writable memory: not repeated here */
  return vdprintf(fd, format, arguments);
}
INTERPOSE int __dprintf_chk(int fd, int flag, const char *format, ...) {
  (void)flag;
  va_list arguments;
  va_start(arguments, format);
  int result = vdprintf(fd, format, arguments);
  va_end(arguments);
  return result;
}
