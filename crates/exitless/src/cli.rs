//! The command line.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use clap_complete::Shell;

use crate::options::{BlkOptions, RngOptions, ServiceOptions, parse_count};
use crate::run::RunOptions;
use crate::size::Size;

const EXIT_CODES: &str = "\
Exit codes:
  0  it did what was asked; for a service: it was told to end by SIGTERM, SIGINT, SIGHUP, SIGXCPU or SIGPWR,
     and drained
  1  it failed, or a second signal ended it before it had drained, or it had not drained after 30 s
  2  the command line or the configuration file is wrong";

const BLK_EXAMPLES: &str = "\
Examples:
  A disk in a raw file, four queues, an I/O thread on each of the CPUs 2 to 5:
    exitless blk --socket /run/vm1-disk.sock --backend file:/srv/vm1.raw --queues 4 --cpus 2-5

  A qcow2 image that cannot be written, at most 2000 requests and 100 MiB per second:
    exitless blk --socket /run/iso.sock --backend qcow2:/srv/iso.qcow2 --read-only \\
        --iops 2000 --bandwidth 100M

  A disk that keeps nothing, to measure what a request costs:
    exitless blk --socket /run/null.sock --backend null:8G --poll poll

QEMU connects with
    -object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem
    -chardev socket,id=disk,path=/run/vm1-disk.sock,reconnect=1
    -device vhost-user-blk-pci,chardev=disk,num-queues=4";

const RNG_EXAMPLES: &str = "\
Examples:
    exitless rng --socket /run/vm1-rng.sock --bandwidth 64K";

const SERVE_EXAMPLES: &str = "\
A file has the long options of `exitless blk` and `exitless rng` as keys:
    cpus = \"2-5\"
    control = \"/run/exitless.sock\"
    metrics = \"127.0.0.1:9100\"

    [[blk]]
    socket = \"/run/vm1-disk.sock\"
    backend = \"file:/srv/vm1.raw\"
    queues = 4
    without = [\"packed\", \"discard\"]

    [[rng]]
    socket = \"/run/vm1-rng.sock\"
    bandwidth = \"64K\"

Options on the command line win over the file's.";

const CTL_EXAMPLES: &str = "\
Examples:
    exitless ctl --control /run/exitless.sock list
    exitless ctl --control /run/exitless.sock stats --json
    exitless ctl --control /run/exitless.sock resize --device vm1-disk 16G
    exitless ctl --control /run/exitless.sock resize --device vm1-disk 8G --shrink
    exitless ctl --control /run/exitless.sock limit --device vm1-disk --iops 5000

A command is one line of JSON on the socket, and so is its answer:
    {\"command\":\"resize\",\"device\":\"vm1-disk\",\"bytes\":17179869184}
    {\"resized\":{\"device\":\"vm1-disk\",\"bytes\":17179869184}}
To shrink a disk takes \"shrink\":true, and \"force\":true while a guest is connected.";

const RUN_EXAMPLES: &str = "\
Examples:
    exitless run
    exitless run --guest-job blk --jobs 2 --qd 32 --bs 4k --rw randread --seconds 5 --disk mem:1G,queues=2
    exitless run --kernel vmlinuz --initrd initrd.img --append 'root=/dev/vda1 rw' --cpus 2 --mem 1G \\
        --disk file:root.raw,queues=2 --disk qcow2:data.qcow2 --metrics 127.0.0.1:9100

A Linux guest talks through the serial port: add console=ttyS0 to --append. \
Where stdin is a terminal, all its keys are the guest's, Ctrl-C too. Ctrl-A begins an escape:
  Ctrl-A x       ends the machine
  Ctrl-A Ctrl-A  sends a Ctrl-A
  Ctrl-A h       says this again";

const BENCH_EXAMPLES: &str = "\
Examples:
    exitless bench blk --quick
    exitless bench blk --only 'null/*' --json
    exitless bench vbmq --quick";

const CHECK_CODES: &str = "\
Exit codes, as those of `qemu-img check`:
  0  the image is sound
  1  it could not be checked
  2  it is corrupt, or the command line is wrong
  3  it has leaked clusters, which only take space

Examples:
    exitless check /srv/vm1.qcow2
    exitless check --json /srv/vm1.qcow2";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
    exitless completions bash > /usr/share/bash-completion/completions/exitless
    exitless completions zsh > ~/.zfunc/_exitless
    exitless completions fish > ~/.config/fish/completions/exitless.fish";

/// Virtual disks and other devices for virtual machines, served from dedicated I/O threads without VM exits.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, max_term_width = 110, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a disk (virtio-blk) at a vhost-user socket.
    #[command(after_help = BLK_EXAMPLES)]
    Blk {
        #[command(flatten)]
        #[allow(missing_docs)]
        device: Box<BlkOptions>,
        #[command(flatten)]
        #[allow(missing_docs)]
        service: ServiceOptions,
    },
    /// Serve the host's entropy (virtio-rng) at a vhost-user socket.
    #[command(after_help = RNG_EXAMPLES)]
    Rng {
        #[command(flatten)]
        #[allow(missing_docs)]
        device: RngOptions,
        #[command(flatten)]
        #[allow(missing_docs)]
        service: ServiceOptions,
    },
    /// Serve the devices of a configuration file, all in one process.
    #[command(after_help = SERVE_EXAMPLES)]
    Serve {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        #[command(flatten)]
        #[allow(missing_docs)]
        service: ServiceOptions,
    },
    /// Look at the devices of a running service, and change them.
    #[command(after_help = CTL_EXAMPLES)]
    Ctl {
        /// The service's control socket, what it was given as --control.
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
        /// Print the service's answer as it is, one line of JSON.
        #[arg(long, global = true)]
        json: bool,
        /// What to ask or tell the service.
        #[command(subcommand)]
        command: CtlCommand,
    },
    /// Run a virtual machine with disks, in the monitor of this program.
    ///
    /// Without a kernel, an embedded guest runs: a short tour of every device, or the job it is given.
    ///
    /// A first SIGTERM, SIGINT, SIGHUP, SIGXCPU or SIGPWR presses the machine's power button, and the guest is waited
    /// for; a second one stops the machine, as does the first if the guest does not listen to the button. The embedded
    /// guest ends its job early. The exit code is 1 if the guest failed, was cut off or short, or if requests of its job
    /// failed.
    #[command(after_help = RUN_EXAMPLES)]
    Run(Box<RunOptions>),
    /// Measure this program and other servers side by side.
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(bench::Args),
    /// Check a qcow2 image: whether its tables are sound, and its refcounts right.
    ///
    /// The image is only read, and nobody can write it meanwhile. Files that it is backed by are not looked at.
    #[command(after_help = CHECK_CODES)]
    Check {
        /// The image.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Print one line of JSON, with the keys of `qemu-img check --output=json`.
        #[arg(long)]
        json: bool,
        /// Look at an image that another process writes, too. It may look worse than it is.
        #[arg(long, short = 'U')]
        force_share: bool,
    },
    /// Print a script that completes this program's options in a shell.
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// What a running service can be asked and told.
#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// The devices, and who is connected to them.
    List,
    /// What queues and I/O threads have done since they started.
    Stats,
    /// Change the size of a disk while it is in use. A new size has reached the disk when the command ends.
    Resize {
        /// The disk's name.
        #[arg(long, value_name = "NAME")]
        device: String,
        /// The new size, in bytes or with a unit: 64G. Without it, the disk takes over the size that its file has been
        /// given.
        size: Option<Size>,
        /// Let the size be smaller than it is. What is cut off is destroyed.
        #[arg(long, requires = "size")]
        shrink: bool,
        /// With --shrink: even while a guest is connected.
        #[arg(long, requires = "shrink")]
        force: bool,
    },
    /// Change what a disk may do per second. What is not given is not limited.
    Limit {
        /// The disk's name.
        #[arg(long, value_name = "NAME")]
        device: String,
        /// The most requests per second.
        #[arg(long, value_name = "COUNT", value_parser = parse_count::<NonZeroU64>)]
        iops: Option<NonZeroU64>,
        /// The most bytes per second.
        #[arg(long, value_name = "BYTES")]
        bandwidth: Option<Size>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::stop::SIGNALS;

    #[test]
    fn help_names_all_signals_that_end_a_service_or_a_machine() {
        let mut command = Cli::command();
        let run = command.find_subcommand_mut("run").unwrap().render_long_help().to_string();
        let names = SIGNALS.map(|signal| match signal {
            crate::stop::SIGPWR => "SIGPWR",
            signal => signal_hook::low_level::signal_name(signal).unwrap(),
        });
        for name in names {
            assert!(EXIT_CODES.contains(name), "exit codes: {name}");
            assert!(run.contains(name), "run: {name}");
        }
    }
}
