//! `stockade image`: what is in the image store.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::{Error, Outcome, print};
use crate::image;
use crate::image::flags::StoreFlag;
use crate::image::progress::size;
use crate::image::reference::Reference;
use crate::image::scratch;
use crate::image::store::{Record, Store};

/// Look after the images that containers are made from
#[derive(Args)]
pub struct Image {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    store: GlobalStore,
}

#[derive(Args)]
struct GlobalStore {
    #[command(flatten)]
    store: StoreFlag,
}

#[derive(Subcommand)]
enum Command {
    /// List the images that are there
    #[command(alias = "list")]
    Ls {
        /// How to print them
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
        /// Names only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Bring an image into the store, or look whether it has changed
    Pull {
        /// The image
        #[arg(value_name = "IMAGE")]
        image: Reference,
        /// Do not print its digest
        #[arg(short, long)]
        quiet: bool,
    },
    /// Forget images, and remove what nothing else needs
    #[command(alias = "remove")]
    Rm {
        /// The images
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<Reference>,
    },
    /// Remove what no image and no container needs
    Prune {
        /// Forget all images that no container needs, too
        #[arg(short, long)]
        all: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

pub fn image(args: Image) -> Outcome {
    let store = Store::open(&args.store.store.path()).map_err(image::Error::from)?;
    match args.command {
        Command::Ls { format, quiet } => list(&store, format, quiet),
        Command::Pull { image, quiet } => {
            let record = image::pull(&store, &image)?;
            if quiet { Ok(ExitCode::SUCCESS) } else { print(&format!("{}\n", record.manifest)) }
        }
        Command::Rm { images } => remove(&store, &images),
        Command::Prune { all } => prune(&store, all),
    }
}

fn list(store: &Store, format: Format, quiet: bool) -> Outcome {
    let records = store.records().map_err(image::Error::from)?;
    let bytes = |record: &Record| record.layers.iter().map(|layer| store.layer_size(layer)).sum::<u64>();
    let text = match format {
        _ if quiet => records.iter().map(|record| format!("{}\n", record.reference)).collect(),
        Format::Json => {
            let list: Vec<_> = records
                .iter()
                .map(|record| {
                    json!({ "reference": record.reference, "digest": record.manifest, "id": record.config,
                            "pulled": record.pulled, "size": bytes(record) })
                })
                .collect();
            json!(list).to_string() + "\n"
        }
        Format::Table => {
            let width = records.iter().map(|r| r.reference.chars().count()).max().unwrap_or(0).max(5);
            let line = |image: &str, id: &str, pulled: &str, size: &str| {
                format!("{image:width$}  {id:12}  {pulled:20}  {size}\n")
            };
            let lines = records.iter().map(|record| {
                // To the second.
                let pulled = record.pulled.split('.').next().unwrap_or_default().to_owned() + "Z";
                line(&record.reference, record.config.short(), &pulled, &size(bytes(record)))
            });
            std::iter::once(line("IMAGE", "ID", "PULLED", "SIZE")).chain(lines).collect::<String>()
        }
    };
    print(&text)
}

fn remove(store: &Store, images: &[Reference]) -> Outcome {
    let _claim = store.claim().map_err(image::Error::from)?;
    // All or none.
    for image in images {
        if store.find(&image.to_string()).map_err(image::Error::from)?.is_none() {
            return Err(Error::Usage(format!(
                "{image} is not in the image store: `stockade image ls` shows what is"
            )));
        }
    }
    for image in images {
        store.forget(&image.to_string()).map_err(image::Error::from)?;
    }
    sweep(store)?;
    Ok(ExitCode::SUCCESS)
}

fn prune(store: &Store, all: bool) -> Outcome {
    let _claim = store.claim().map_err(image::Error::from)?;
    scratch::clear(store).map_err(image::Error::from)?;
    if all {
        let pinned = scratch::pinned(store).map_err(image::Error::from)?;
        for record in store.records().map_err(image::Error::from)? {
            // One without layers is nobody's need.
            if record.layers.is_empty() || record.layers.iter().any(|layer| !pinned.contains(layer)) {
                store.forget(&record.reference).map_err(image::Error::from)?;
            }
        }
    }
    let freed = sweep(store)?;
    print(&format!("{} freed\n", size(freed)))
}

/// Removes layers and documents that nothing needs; the bytes that layers had.
fn sweep(store: &Store) -> Result<u64, Error> {
    let pinned = scratch::pinned(store).map_err(image::Error::from)?;
    Ok(store.sweep(&pinned).map_err(image::Error::from)?)
}
