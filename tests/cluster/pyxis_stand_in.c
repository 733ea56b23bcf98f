/* Takes pyxis's options of srun and runs the task in a folder that holds a root file system: enough to see whether
 * our container flags, mounts, working directory and script work in an image of ours. Not pyxis: no import of images,
 * no user namespaces, no environment rules. Needs root.
 *
 *   gcc -shared -fPIC -o pyxis.so pyxis_stand_in.c        plugstack.conf: required /path/pyxis.so
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_stand_in, 1);

enum { IMAGE, MOUNTS, WORKDIR, IGNORED, COUNT };
static char *given[COUNT];

static int remember(int which, const char *text, int remote) {
    (void)remote;
    free(given[which]);
    given[which] = strdup(text ? text : "");
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "DIR", "root file system", 1, IMAGE, remember},
    {"container-mounts", "SOURCE:TARGET[:ro],...", "bind mounts", 1, MOUNTS, remember},
    {"container-workdir", "DIR", "working directory", 1, WORKDIR, remember},
    {"container-env", "NAME,...", "accepted", 1, IGNORED, remember},
    {"no-container-mount-home", NULL, "accepted", 0, IGNORED, remember},
    SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    (void)argc;
    (void)argv;
    if (spank_context() == S_CTX_SLURMD) return 0;
    for (struct spank_option *option = options; option->name; option++)
        if (spank_option_register(spank, option) != ESPANK_SUCCESS) return -1;
    return 0;
}

static int make_folders(const char *path) {
    char part[4096];
    for (size_t i = 1; i <= strlen(path) && i < sizeof part; i++)
        if (path[i] == '/' || path[i] == 0) {
            snprintf(part, i + 1, "%s", path);
            if (mkdir(part, 0755) && errno != EEXIST) return -1;
        }
    return 0;
}

static int bind_into(const char *root, const char *source, const char *target, int read_only) {
    char place[4096];
    struct stat found;
    snprintf(place, sizeof place, "%s%s", root, target);
    if (stat(source, &found)) {
        slurm_error("pyxis: couldn't mount %s: %m", source);
        return -1;
    }
    if (S_ISDIR(found.st_mode) ? make_folders(place) : 0) return -1;
    if (mount(source, place, NULL, MS_BIND | MS_REC, NULL)) {
        slurm_error("pyxis: couldn't mount %s at %s: %m", source, place);
        return -1;
    }
    return read_only ? mount(NULL, place, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL) : 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv) {
    (void)spank;
    (void)argc;
    (void)argv;
    const char *root = given[IMAGE];
    if (!root) return 0;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return -1;
    const char *system[] = {"/proc", "/sys", "/dev"};
    for (int i = 0; i < 3; i++)
        if (bind_into(root, system[i], system[i], 0)) return -1;
    char *rest_of_mounts, *mounts = given[MOUNTS];
    for (char *one = mounts ? strtok_r(mounts, ",", &rest_of_mounts) : NULL; one;
         one = strtok_r(NULL, ",", &rest_of_mounts)) {
        char *rest, *source = strtok_r(one, ":", &rest), *target = strtok_r(NULL, ":", &rest);
        char *flags = strtok_r(NULL, ":", &rest);
        if (!target || bind_into(root, source, target, flags && !strcmp(flags, "ro"))) return -1;
    }
    if (chroot(root) || chdir("/")) return -1;
    return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
    (void)argc;
    (void)argv;
    if (!given[IMAGE]) return 0;
    const char *workdir = given[WORKDIR] ? given[WORKDIR] : "/";
    if (chdir(workdir)) {
        slurm_error("pyxis: couldn't chdir to %s: %m", workdir);
        return -1;
    }
    spank_setenv(spank, "PWD", workdir, 1);
    return 0;
}
