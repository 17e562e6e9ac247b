//! User-Mode Linux: the kernel as an ordinary process. Boots in a second, has one CPU and drives one queue.
//!
//! Its buffer for registers is smaller than the state of some processors, and there it dies of its first process. A
//! preloaded library mends that (`preload/xstate.c`); it is built where User-Mode Linux does not run without.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guest::Guest;
use crate::kernel::Kernel;
use crate::scratch::Scratch;
use crate::{compile, initramfs, kernel, probe, process};

/// A User-Mode Linux that runs here.
pub(crate) struct Uml {
    kernel: Kernel,
    preload: Option<PathBuf>,
}

impl Uml {
    /// The one that is installed, or the reason why it cannot be used.
    pub(crate) fn find() -> Result<Self, String> {
        let name = |uml: &Self| if uml.preload.is_some() { "uml-preloaded" } else { "uml" };
        Self::choose(kernel::uml()?, |uml| probe::once(name(uml), || uml.works()))
    }

    /// `kernel` with a preloaded library if it only works so.
    fn choose(kernel: Kernel, works: impl Fn(&Self) -> Result<(), String>) -> Result<Self, String> {
        let mut uml = Self { kernel, preload: None };
        let Err(plain) = works(&uml) else { return Ok(uml) };
        let reason = |more| format!("User-Mode Linux does not work: {plain}; {more}");
        uml.preload = Some(library().map_err(reason)?);
        works(&uml).map_err(|preloaded| reason(format!("with larger registers: {preloaded}")))?;
        Ok(uml)
    }

    fn works(&self) -> Result<(), String> {
        probe::boots(&mut self.command(&Scratch::new(), "probe", &[]))
    }

    /// Boots a guest that runs `job` with a disk from the vhost-user-blk service at `socket`.
    pub(crate) fn boot(&self, scratch: &Scratch, socket: &Path, job: &str, programs: &[&str]) -> Guest {
        let mut command = self.command(scratch, job, programs);
        Guest::boot("uml", command.arg(format!("virtio_uml.device={}:2", socket.display())))
    }

    fn command(&self, scratch: &Scratch, job: &str, programs: &[&str]) -> Command {
        let initrd = initramfs::build("uml", &self.kernel, programs);
        let mut command = process::command(&self.kernel.image);
        command
            .args(["mem=256M", "rdinit=/init", "con=null", "con0=null,fd:1", "quiet", "umid=guest"])
            .arg(format!("initrd={}", initrd.display()))
            .arg(format!("uml_dir={}", scratch.path("").display()))
            .arg(format!("job={job}"));
        if let Some(library) = &self.preload {
            command.env("LD_PRELOAD", library);
        }
        command
    }
}

fn library() -> Result<PathBuf, String> {
    compile::c_library("xstate", include_str!("preload/xstate.c"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::needs::{self, Need};

    #[test]
    fn a_tracer_whose_buffer_is_too_small_sets_registers_by_the_library() {
        let Some(_turn) = needs::turn(&[]) else { return };
        let tools = compile::c_program("xstate-check", include_str!("preload/check.c"))
            .and_then(|check| Ok((check, library()?)));
        let (check, library) = match tools {
            Ok(tools) => tools,
            Err(reason) => return needs::skip(reason),
        };
        let Err(plain) = probe::succeeds(&mut Command::new(&check)) else {
            return needs::skip("no processor with more state than the tracer's buffer holds");
        };
        assert!(plain.ends_with("set failed, errno = 14"), "{plain}");
        assert_eq!(probe::succeeds(Command::new(&check).env("LD_PRELOAD", library)), Ok(()));
    }

    /// A kernel that fails as on such a processor, and goes on as the installed one if `goes_on` says so.
    fn fake(scratch: &Scratch, goes_on: &str) -> Kernel {
        let installed = kernel::uml().expect("UmlKernel is among the needs");
        let script = format!(
            "#!/bin/sh\nif {goes_on}; then exec {} \"$@\"; fi\necho 'ptrace set fp regs failed, errno = 14'\nexit 1\n",
            installed.image.display()
        );
        let image = scratch.path("linux");
        fs::write(&image, script).expect("write a fake kernel");
        fs::set_permissions(&image, fs::Permissions::from_mode(0o755)).expect("make it a program");
        Kernel { image, modules: installed.modules }
    }

    #[test]
    fn user_mode_linux_gets_the_library_where_it_needs_it() {
        let Some(_turn) = needs::turn(&[Need::UmlKernel]) else { return };
        if let Err(reason) = library() {
            return needs::skip(reason);
        }
        let scratch = Scratch::new();
        let kernel = fake(&scratch, "[ -n \"$LD_PRELOAD\" ]");
        let uml = Uml::choose(kernel, Uml::works).unwrap_or_else(|reason| panic!("{reason}"));
        assert!(uml.preload.is_some());
    }

    #[test]
    fn a_user_mode_linux_that_does_not_run_at_all_is_not_used() {
        let Some(_turn) = needs::turn(&[Need::UmlKernel]) else { return };
        let scratch = Scratch::new();
        let reason = Uml::choose(fake(&scratch, "false"), Uml::works).err().expect("it cannot work");
        assert!(reason.contains("ptrace set fp regs failed, errno = 14"), "{reason}");
    }
}
