/* The first process of the emulated machine: loads the modules for the host's files, makes them its root,
 * runs one command there and switches the machine off. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void off(const char *failure) {
  if (failure != NULL) perror(failure);
  sync();
  reboot(RB_POWER_OFF);
  _exit(1);
}

static void load(const char *path) {
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0 || syscall(SYS_finit_module, file, "", 0) != 0) off(path);
  close(file);
}

int main(void) {
  char line[512];
  FILE *modules = fopen("/modules", "r");
  if (modules == NULL) off("/modules");
  while (fgets(line, sizeof(line), modules) != NULL) {
    line[strcspn(line, "\n")] = '\0';
    load(line);
  }
  if (mount("host", "/root", "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,cache=loose,msize=524288") != 0)
    off("mount of the host's files");
  if (chroot("/root") != 0 || chdir("/") != 0) off("chroot");
  if (mount("proc", "/proc", "proc", 0, "") != 0 || mount("sysfs", "/sys", "sysfs", 0, "") != 0 ||
      mount("devtmpfs", "/dev", "devtmpfs", 0, "") != 0 || mount("tmpfs", "/tmp", "tmpfs", 0, "") != 0)
    off("mount");
  /* The command comes as KTK_GUEST_COMMAND of the kernel's command line, which init gets as environment. */
  const char *command = getenv("KTK_GUEST_COMMAND");
  if (command == NULL) off("KTK_GUEST_COMMAND is missing");
  const pid_t child = fork();
  if (child == 0) {
    execl("/bin/sh", "sh", command, (char *)NULL);
    _exit(127);
  }
  int status = 0;
  while (wait(&status) != child) {
  }
  printf("\nguest status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  fflush(stdout);
  off(NULL);
}
