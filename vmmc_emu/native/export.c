/*
 * export.c: buffers that others may use, and the use of others' buffers.
 *
 * The NIC alone decides who may do what; this side keeps exported memory pinned and remembers what
 * it asked for.
 */
#include <errno.h>
#include <string.h>

#include "vmmc_private.h"

struct exported *export_find(struct vmmc_endpoint *v, int export_id) {
  if (export_id < 0 || export_id >= VMMC_EXPORTS || !v->exported[export_id].used) return NULL;
  return &v->exported[export_id];
}

void export_gone(struct vmmc_endpoint *v, uint32_t export_id) {
  struct exported *x = &v->exported[export_id];
  if (x->post) redirect_withdraw(v, export_id);
  notify_drop(v, export_id);
  utlb_release(v, x->offset, x->length);
  *x = (struct exported){0};
  notify_changed(v); /* whoever waits for notifications of it */
}

/* A name as it stands in a command: not empty, at most 32 bytes. */
static bool name_copy(char *to, const char *name) {
  size_t length = strlen(name);
  if (length < 1 || length > VMMC_NAME_MAX) return false;
  memcpy(to, name, length);
  return true;
}

int vmmc_export(struct vmmc_endpoint *v, void *memory, uint64_t length, const char *name,
                uint32_t permissions, int whom) {
  if (!call_begin(v)) return -1;
  struct vmmc_command command = {
      .op = VMMC_OP_EXPORT, .length = length, .permissions = permissions, .node = (uint32_t)whom};
  if (!length || !permissions || permissions & ~(uint32_t)(VMMC_WRITE | VMMC_READ)) return fail(EINVAL);
  if (whom != VMMC_ANYONE && (whom < 0 || (uint32_t)whom >= v->endpoint->nodes)) return fail(EHOSTUNREACH);
  if (name && !name_copy(command.name, name)) return fail(EINVAL);

  pthread_mutex_lock(&v->lock);
  int id = 0, error = 0;
  while (id < VMMC_EXPORTS && v->exported[id].used) id++;
  if (id == VMMC_EXPORTS)
    error = ENOMEM;
  else if (!heap_offset(v, memory, length, &command.offset))
    error = EFAULT;
  else
    error = utlb_hold_all(v, command.offset, length);
  if (!error) v->exported[id] = (struct exported){.used = true, .offset = command.offset, .length = length};
  pthread_mutex_unlock(&v->lock);
  if (error) return fail(error);

  command.export_id = (uint32_t)id;
  struct operation answer;
  error = operation_run(v, &command, -1, &answer);
  if (error == EAGAIN) { /* never taken up, so nothing else gives the memory back */
    pthread_mutex_lock(&v->lock);
    export_gone(v, (uint32_t)id);
    pthread_mutex_unlock(&v->lock);
  }
  return error ? fail(error) : id;
}

int vmmc_unexport(struct vmmc_endpoint *v, int export_id) {
  if (!call_begin(v)) return -1;
  pthread_mutex_lock(&v->lock);
  struct exported *x = export_find(v, export_id);
  if (x && x->post) redirect_withdraw(v, (uint32_t)export_id);
  pthread_mutex_unlock(&v->lock);
  if (!x) return fail(EINVAL);
  struct vmmc_command command = {.op = VMMC_OP_UNEXPORT, .export_id = (uint32_t)export_id};
  struct operation answer;
  int error = operation_run(v, &command, -1, &answer);
  return error ? fail(error) : 0;
}

int64_t vmmc_export_number(struct vmmc_endpoint *v, int export_id) {
  if (!call_begin(v)) return -1;
  pthread_mutex_lock(&v->lock);
  bool known = export_find(v, export_id);
  pthread_mutex_unlock(&v->lock);
  return known ? (int64_t)VMMC_EXPORT_NUMBER(v->endpoint->index, (uint32_t)export_id) : fail(EINVAL);
}

/* ---- import ---- */

void import_known(struct vmmc_endpoint *v, uint32_t import_id, bool used, uint64_t length) {
  if (import_id < VMMC_EXPORTS) v->imported[import_id] = (struct imported){used, length};
}

static int import(struct vmmc_endpoint *v, const struct vmmc_command *command, struct vmmc_import *out,
                  int timeout_ms) {
  if (command->node >= v->endpoint->nodes) return fail(EHOSTUNREACH);
  struct operation answer;
  int error = operation_run(v, command, timeout_ms, &answer);
  if (error) return fail(error);
  *out = (struct vmmc_import){
      .id = answer.id, .node = command->node, .length = answer.length, .permissions = answer.permissions};
  return 0;
}

int vmmc_import(struct vmmc_endpoint *v, uint32_t node, const char *name, struct vmmc_import *out,
                int timeout_ms) {
  if (!call_begin(v)) return -1;
  struct vmmc_command command = {.op = VMMC_OP_IMPORT, .node = node};
  if (!name || !out || !name_copy(command.name, name)) return fail(EINVAL);
  return import(v, &command, out, timeout_ms);
}

int vmmc_import_number(struct vmmc_endpoint *v, uint32_t node, uint32_t number, struct vmmc_import *out,
                       int timeout_ms) {
  if (!call_begin(v)) return -1;
  struct vmmc_command command = {.op = VMMC_OP_IMPORT, .node = node, .export_id = number};
  if (!out) return fail(EINVAL);
  return import(v, &command, out, timeout_ms);
}

int vmmc_unimport(struct vmmc_endpoint *v, uint32_t import_id) {
  if (!call_begin(v)) return -1;
  struct vmmc_command command = {.op = VMMC_OP_UNIMPORT, .import_id = import_id};
  struct operation answer;
  int error = operation_run(v, &command, -1, &answer);
  return error ? fail(error) : 0;
}
