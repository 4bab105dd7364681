/*
 * streams.c: stdio on a socket.
 *
 * The C library's streams call its own read and write, which nobody can take over.  A stream that fdopen
 * makes of a VMMC socket therefore gets functions of its own; dprintf formats and then writes.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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
static int stream_close(void *cookie) { return close((int)(intptr_t)cookie); }

INTERPOSE FILE *fdopen(int fd, const char *mode) {
  struct file *f = socket_get(fd);
  if (!f) return REAL(fdopen)(fd, mode);
  file_put(f);
  if (f == &file_forked) {
    descriptor_refuse(fd);
    return NULL;
  }
  FILE *stream = fopencookie((void *)(intptr_t)fd, mode,
                             (cookie_io_functions_t){stream_read, stream_write, NULL, stream_close});
  if (stream) stream->_fileno = fd; /* what fileno() answers: the C library keeps it there for all streams */
  return stream;
}

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
